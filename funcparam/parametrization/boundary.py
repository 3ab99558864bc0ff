"""The boundary of the dictionary level: everything is checked here, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from funcparam.parametrization.names import closest
from funcparam.transforms.contract.base import AnyTransform, Raw, State, readable
from funcparam.transforms.contract.signature import (
    Signature,
    TensorSpec,
    check_named,
    check_raw,
    describe,
)

RawTree: TypeAlias = Mapping[str, Raw]
StateTree: TypeAlias = Mapping[str, State]

T = TypeVar("T")

_look = attrgetter("shape", "dtype", "is_meta")
_dict: Any = dict  # without types of keys and values, which a comparison cannot know


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


class Expected:
    """What raw and state look like, prepared for a quick comparison."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        found = {entry.name: entry.signature for entry in entries}
        raws = [s.raw if isinstance(s.raw, TensorSpec) else dict(s.raw) for s in found.values()]
        states = {name: dict(s.state) for name, s in found.items() if s.state}
        nested = [{"": raw} if isinstance(raw, TensorSpec) else raw for raw in raws]
        specs = [spec for own in (*nested, *states.values()) for spec in own.values()]
        self._names = list(found)
        self._keys = [None if isinstance(raw, TensorSpec) else list(raw) for raw in raws]
        self._is_flat = all(keys is None for keys in self._keys)
        self._state = [(name, list(own)) for name, own in states.items()]
        self._shapes, self._dtypes = [s.shape for s in specs], [s.dtype for s in specs]
        # A product of meta tensors and others is garbage; compilers raise for it by themselves.
        self._looks = [[(s.shape, s.dtype, meta) for s in specs] for meta in (False, True)]

    def fits(self, raw: Any, state: Any) -> bool:
        """Whether all names, in order, shapes and dtypes are the expected ones.

        False where something is unusual, such as a mapping that is no dict; that may still be
        right. A microsecond is a tenth of the quickest map, so nothing here is called in vain.
        """
        if type(raw) is not _dict or list(raw) != self._names:
            return False
        if type(state) is not _dict or len(state) != len(self._state):
            return False
        tensors: list[Any] = [*raw.values()] if self._is_flat else []
        for own, keys in () if self._is_flat else zip(raw.values(), self._keys, strict=True):
            if keys is None:
                tensors.append(own)
            elif type(own) is _dict and list(own) == keys:
                tensors += own.values()
            else:
                return False
        for name, keys in self._state:
            own = state.get(name)
            if type(own) is not _dict or list(own) != keys:
                return False
            tensors += own.values()
        try:
            if torch.compiler.is_compiling():  # which does not know attrgetter
                shapes, dtypes = [t.shape for t in tensors], [t.dtype for t in tensors]
                return shapes == self._shapes and dtypes == self._dtypes
            return list(map(_look, tensors)) in self._looks
        except AttributeError:
            return False


def checked(
    entries: Sequence[Entry], expected: Expected, raw: RawTree, state: StateTree | None
) -> StateTree:
    """Raise unless raw and state are what is expected, and return state: {} if left out."""
    state = {} if state is None else state
    if not expected.fits(raw, state):
        if expected.fits(state, raw):
            raise ValueError("raw, state: expected raw first, p(raw, state); got state first")
        check_raw_tree(entries, raw)
        check_state_tree(entries, state)
        expect_one_device(entries, raw, state)
    return state


def check_raw_tree(entries: Sequence[Entry], raw: RawTree) -> None:
    """Raise for the first thing that is wrong with raw, naming its path."""
    if not isinstance(raw, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"raw: expected a dict; got {describe(raw)}. raw, state = p.init(net) makes it, and"
            " model.raw_and_state() has that of a Parametrized"
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


def check_state_tree(entries: Sequence[Entry], state: StateTree) -> None:
    """Raise for the first thing that is wrong with state, naming its path."""
    if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"state: expected a dict; got {describe(state)}. raw, state = p.init(net) makes it, and"
            " model.raw_and_state() has that of a Parametrized"
        )
    chosen = [entry for entry in entries if entry.transform is not None]
    for entry in chosen:
        _check_state(entry, state)
    unknown = set(state) - {entry.name for entry in chosen}
    if unknown:
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


def explained(
    entries: Sequence[Entry],
    evaluate: Callable[[RawTree, StateTree], T],
    raw: RawTree,
    state: StateTree,
) -> T:
    """Evaluate; if that fails because raw and state do not fit together, say so."""
    if torch.compiler.is_compiling():
        return evaluate(raw, state)
    try:
        return evaluate(raw, state)
    except RuntimeError:  # to look before would take longer than the quickest map
        expect_one_device(entries, raw, state)
        _expect_one_precision(entries, raw, state)
        raise


def expect_one_device(entries: Sequence[Entry], raw: RawTree, state: StateTree) -> None:
    """Raise for raw and state of one weight on several devices."""
    for entry in entries:
        devices = {path: tensor.device for path, tensor in _tensors(entry, raw, state)}
        _expect_one("device", entry, devices)


def _expect_one_precision(entries: Sequence[Entry], raw: RawTree, state: StateTree) -> None:
    """Raise for raw and state of one weight in several precisions."""
    for entry in entries:
        dtypes = {path: tensor.dtype for path, tensor in _tensors(entry, raw, state)}
        inexact = {p: d for p, d in dtypes.items() if d.is_floating_point or d.is_complex}
        _expect_one("precision", entry, {path: d.to_real() for path, d in inexact.items()})


def _tensors(entry: Entry, raw: RawTree, state: StateTree) -> Iterator[tuple[str, Tensor]]:
    own, where = raw[entry.name], f"raw[{entry.name!r}]"
    if isinstance(own, Tensor):
        yield where, own
    else:
        yield from ((f"{where}[{key!r}]", tensor) for key, tensor in own.items())
    for key, tensor in state.get(entry.name, {}).items():
        yield f"state[{entry.name!r}][{key!r}]", tensor


def _expect_one(what: str, entry: Entry, found: Mapping[str, object]) -> None:
    kinds = list(found.values())
    if any(kind != kinds[0] for kind in kinds):
        got = ", ".join(f"{path} in {kind}" for path, kind in found.items())
        raise ValueError(
            f"{entry.name!r}: expected raw and state of one {what}; got {got}. Convert them alike,"
            " with .to"
        )


def expect_finite(name: str, value: Tensor) -> None:
    """Raise for NaN and infinity, where the entries can be read."""
    if not _is_finite(value):
        raise ValueError(f"{name!r}: expected finite values; got NaN or infinity")


def expect_finite_result(
    name: str, transform: AnyTransform, value: Tensor, raw: Raw, state: State
) -> None:
    """Raise where a right inverse led to NaN or infinity, from which nothing can be trained."""
    named = {"": raw} if isinstance(raw, Tensor) else raw
    for kind, tensors in (("raw", named), ("state", state)):
        for key, tensor in tensors.items():
            if tensor is not value and not _is_finite(tensor):
                raise ValueError(
                    f"{name!r}: {transform!r} cannot represent this value in"
                    f" {str(tensor.dtype)[6:]}: its right inverse gives {kind}"
                    f"{f' {key!r}' if key else ''} with NaN, or above the largest number"
                    f" {torch.finfo(tensor.dtype).max:.6g}. A wider dtype may hold it"
                )


def _is_finite(tensor: Tensor) -> bool:
    return not readable(tensor) or bool(torch.isfinite(tensor).all())


def distance_moved(value: Tensor, projected: Tensor, stored: torch.dtype | None = None) -> float:
    """How far the entry went that a projection moved most; 0 where that is rounding.

    Args:
        value: before.
        projected: after.
        stored: the dtype in which the value was rounded last.
    """
    inexact = value.is_floating_point() or value.is_complex()
    if not inexact or value.numel() == 0 or not (readable(value) and readable(projected)):
        return 0.0
    value, projected = value.detach(), projected.detach()
    by, size = (projected - value).abs().max(), value.abs().max()
    rounding = max(torch.finfo(dtype).eps for dtype in (value.dtype, stored or value.dtype)) ** 0.5
    return float(by) if bool(by > rounding * size.clamp_min(rounding)) else 0.0


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike, and equal where entries can be read; NaN is equal to NaN."""
    if a is b:
        return True
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if not (readable(a) and readable(b)):
        return True
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def value_of(entry: Entry, given: Mapping[str, Tensor]) -> Tensor:
    """Find the one tensor for the names of an entry, or raise for what is wrong with it."""
    present = [name for name in entry.names if name in given]
    if not present:
        raise ValueError(f"missing {entry.name!r}: p was made with it; got {describe(given)}")
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
    if not are_equal(value, other):
        raise ValueError(
            f"{name!r} and {alias!r} are tied in the parametrization; got two different tensors"
        )
