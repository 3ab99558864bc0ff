"""The boundary of the dictionary level: everything is checked here, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from funcparam.transforms._base import AnyTransform, Raw, State
from funcparam.transforms._signature import Signature, check_named, check_raw, describe

RawTree: TypeAlias = Mapping[str, Raw]
StateTree: TypeAlias = Mapping[str, State]
Shapes: TypeAlias = "dict[str, tuple[int, ...] | None]"


@dataclass(frozen=True)
class Entry:
    """One leaf of a parametrization: its names, what it looks like, and its transform."""

    names: tuple[str, ...]
    signature: Signature
    transform: AnyTransform | None

    @property
    def name(self) -> str:
        """The first name, under which raw and state have it."""
        return self.names[0]


def looks_right(shapes: Shapes, raw: RawTree) -> bool:
    """Whether names and plain shapes are as expected; the fast way, for thousands of leaves."""
    if not isinstance(raw, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        return False
    return {name: getattr(tensor, "shape", None) for name, tensor in raw.items()} == shapes


def check_raw_tree(entries: Sequence[Entry], raw: RawTree) -> None:
    """Raise for the first thing that is wrong with raw, naming its path."""
    if not isinstance(raw, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"raw: expected a dict; got {describe(raw)}. raw, state = p.init(...) makes it"
        )
    known = {name: entry for entry in entries for name in entry.names}
    for name in raw:
        if name not in known:
            raise ValueError(f"raw: unknown name {name!r}; p was made without it")
        if name != known[name].name:
            first = known[name].name
            raise ValueError(f"raw: {name!r} is tied to {first!r}; raw has it under that name only")
    for entry in entries:
        if entry.name not in raw:
            raise ValueError(f"raw: missing {entry.name!r}; got {describe(raw)}")
        check_raw(entry.signature.raw, raw[entry.name], f"raw[{entry.name!r}]")


def check_chosen(chosen: Sequence[Entry], raw: RawTree, state: StateTree) -> None:
    """Raise for the first thing that is wrong with the raw and the state of a transform."""
    if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"state: expected a dict; got {describe(state)}. raw, state = p.init(...) makes it"
        )
    left = len(state)
    for entry in chosen:
        name, expected = entry.name, entry.signature
        check_raw(expected.raw, raw[name], f"raw[{name!r}]")
        if name in state:
            left -= 1
            check_named(expected.state, state[name], f"state[{name!r}]")
        elif expected.state:
            raise ValueError(
                f"state: missing {name!r} with {', '.join(repr(key) for key, _ in expected.state)}."
                " raw, state = p.init(...) makes it, and p(raw, state) needs both"
            )
    if left:
        unknown = set(state) - {entry.name for entry in chosen}
        raise ValueError(f"state: unknown names {sorted(map(str, unknown))}; no transform has them")


def expect_finite(name: str, value: Tensor) -> None:
    """Raise for NaN and infinity, where the entries can be read."""
    if value.is_meta or torch.func.debug_unwrap(value) is not value:
        return
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name!r}: expected finite values; got NaN or infinity")


def expect_tied(name: str, value: Tensor, alias: str, other: Tensor) -> None:
    """Raise unless two names of a tie have one value, where the entries can be read."""
    if other is value or value.is_meta or torch.func.debug_unwrap(value) is not value:
        return
    if not torch.equal(value, other):
        raise ValueError(
            f"{name!r} and {alias!r} are tied in the parametrization; got two different tensors"
        )
