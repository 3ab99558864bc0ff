"""The boundary of the dictionary level: everything is checked here, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from funcparam._names import closest
from funcparam.transforms._base import AnyTransform, Raw, State, readable
from funcparam.transforms._signature import (
    NamedSpecs,
    Signature,
    TensorSpec,
    check_named,
    check_raw,
    describe,
)

RawTree: TypeAlias = Mapping[str, Raw]
StateTree: TypeAlias = Mapping[str, State]

Layout: TypeAlias = "tuple[list[str] | None, list[tuple[tuple[int, ...], torch.dtype]]]"

_NOTHING: State = MappingProxyType({})


@dataclass(frozen=True)
class Entry:
    """One leaf of a parametrization: its names, what it looks like, and its transform."""

    names: tuple[str, ...]
    signature: Signature
    transform: AnyTransform | None
    _raw: Layout = field(init=False, repr=False, compare=False)
    _state: Layout = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_raw", _layout(self.signature.raw))
        object.__setattr__(self, "_state", _layout(self.signature.state))

    @property
    def name(self) -> str:
        """The first name, under which raw and state have it."""
        return self.names[0]

    def fits(self, raw: Any, state: Any) -> bool:
        """Whether all names, shapes and dtypes are the expected ones; quick, and without errors."""
        return _fits(raw, self._raw) and _fits(state, self._state)


def _layout(specs: TensorSpec | NamedSpecs) -> Layout:
    if isinstance(specs, TensorSpec):
        return None, [(specs.shape, specs.dtype)]
    return [name for name, _ in specs], [(spec.shape, spec.dtype) for _, spec in specs]


def _fits(tensors: Any, layout: Layout) -> bool:
    names, expected = layout
    if names is None:
        tensors = (tensors,)
    elif not names:
        return len(tensors) == 0
    elif isinstance(tensors, dict) and list(cast("dict[str, Any]", tensors)) == names:
        tensors = cast("dict[str, Any]", tensors).values()
    else:
        return False
    return [(getattr(t, "shape", None), getattr(t, "dtype", None)) for t in tensors] == expected


def looks_right(names: list[str], plain: list[Any], raw: RawTree) -> bool:
    """Whether names are as expected, in order, and what passes through has its shapes and dtypes.

    One comparison of lists: quick for thousands of leaves.
    """
    if not isinstance(raw, dict) or list(raw) != names:
        return False
    found = [(getattr(t, "shape", None), getattr(t, "dtype", None)) for t in raw.values()]
    return found == plain


def check_raw_tree(entries: Sequence[Entry], raw: RawTree) -> None:
    """Raise for the first thing that is wrong with raw, naming its path."""
    if not isinstance(raw, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"raw: expected a dict; got {describe(raw)}. raw, state = p.init(...) makes it"
        )
    known = {name: entry for entry in entries for name in entry.names}
    for name in raw:
        if name not in known:
            raise ValueError(f"raw: unknown name {name!r}; {closest(name, [*known])}")
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
        name = entry.name
        left -= name in state
        if not entry.fits(raw[name], state.get(name, _NOTHING)):
            check_raw(entry.signature.raw, raw[name], f"raw[{name!r}]")
            _check_state(entry, state)
    if left:
        unknown = set(state) - {entry.name for entry in chosen}
        raise ValueError(f"state: unknown names {sorted(map(str, unknown))}; no transform has them")


def _check_state(entry: Entry, state: StateTree) -> None:
    expected = entry.signature.state
    if entry.name in state:
        check_named(expected, state[entry.name], f"state[{entry.name!r}]")
    elif expected:
        names = ", ".join(repr(name) for name, _ in expected)
        raise ValueError(
            f"state: missing {entry.name!r} with {names}."
            " raw, state = p.init(...) makes it, and p(raw, state) needs both"
        )


def expect_finite(name: str, value: Tensor) -> None:
    """Raise for NaN and infinity, where the entries can be read."""
    if readable(value) and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name!r}: expected finite values; got NaN or infinity")


def value_of(entry: Entry, given: Mapping[str, Tensor]) -> Tensor:
    """Find the one tensor for the names of an entry, or raise for what is wrong with it."""
    present = [name for name in entry.names if name in given]
    if not present:
        raise ValueError(f"missing {entry.name!r}; got {describe(given)}")
    value = given[present[0]]
    for name in present[1:]:
        _expect_tied(present[0], value, name, given[name])
    if not entry.signature.value.admits(value):
        raise ValueError(
            f"{entry.name!r}: expected {entry.signature.value}; got {TensorSpec.of(value)}"
        )
    return value


def _expect_tied(name: str, value: Tensor, alias: str, other: Tensor) -> None:
    """Raise unless two names of a tie have one value, where the entries can be read."""
    if other is not value and readable(value) and not torch.equal(value, other):
        raise ValueError(
            f"{name!r} and {alias!r} are tied in the parametrization; got two different tensors"
        )
