"""Equal leaves are stacked and mapped in one call, where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from operator import attrgetter
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor, nn

from funcparam.parametrization.boundary import Entry, RawTree, StateTree
from funcparam.transforms.contract.base import AnyTransform, Raw, State, Transform
from funcparam.transforms.contract.steps import detached, refreshed, updated

Stack: TypeAlias = "tuple[Any, State]"
"""Raw and state of a group, each tensor with the leaves along dimension 0."""

_PLAIN = (nn.Parameter, Tensor)

_look = attrgetter("__class__", "dtype", "device", "requires_grad")

_unsafe_split = cast("Any", torch.unsafe_split)

_KINDS = ("cpu", "cuda")  # for which it is worked out once and not at each call

TRACED_UP_TO = 64 * 64
"""Entries up to which a trace stacks whatever is stacked at all. A compiler takes its time for each
operation, and those of a stack are there once: 24 leaves take half of it, a step a tenth more."""


@dataclass(frozen=True)
class Group:
    """The leaves with one transform and equal shapes and dtypes."""

    transform: AnyTransform
    entries: tuple[Entry, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The leaves."""
        return tuple(entry.name for entry in self.entries)

    def obstacle(self, kind: str) -> str:
        """Why the leaves are evaluated one by one on a kind of device; empty if in a stack."""
        stacks = self.transform.stacks(kind)
        if stacks is None:
            return "no gain measured"
        fewest, largest = stacks
        if len(self.entries) < fewest:
            return f"fewer than {fewest}"
        if self._size > largest:
            return f"{self._size} entries, no gain above {largest}"
        return ""

    def is_stacked(self, kind: str) -> bool:
        """Whether the leaves are evaluated in one call."""
        return not self.obstacle(kind)

    def is_stacked_in_traces(self, kind: str) -> bool:
        """Whether a compiler sees the leaves in a stack."""
        fewest, largest = self.transform.stacks(kind) or (inf, 0)
        return len(self.entries) >= fewest and self._size <= max(largest, TRACED_UP_TO)

    @property
    def _size(self) -> int:
        return prod(self.entries[0].signature.value.shape)


Stacks: TypeAlias = "list[tuple[AnyTransform, tuple[str, ...]]]"
Single: TypeAlias = "list[tuple[AnyTransform, str]]"
Parts: TypeAlias = "tuple[Stacks, Single]"
"""The leaves that are mapped in stacks, and those that are mapped one by one."""


def _parted(groups: Sequence[Group], kind: str, is_stacked: Callable[[Group, str], bool]) -> Parts:
    stacks = [group for group in groups if is_stacked(group, kind)]
    single = [group for group in groups if not is_stacked(group, kind)]
    return (
        [(group.transform, group.names) for group in stacks],
        [(group.transform, name) for group in single for name in group.names],
    )


@final
class Plan:
    """How the transforms of a parametrization are evaluated: in stacks, or by themselves."""

    def __init__(self, chosen: Sequence[Entry]) -> None:
        alike: dict[Any, list[Entry]] = {}
        for entry in chosen:
            alike.setdefault((entry.transform, entry.signature), []).append(entry)
        self.groups = tuple(
            Group(cast("AnyTransform", entries[0].transform), tuple(entries))
            for entries in alike.values()
        )
        self._first = self.groups[0].names[0] if self.groups else None
        self._by_kind = {kind: self._both(kind) for kind in _KINDS}

    def _both(self, kind: str) -> tuple[Parts, Parts]:
        """The leaves as a kind of device maps them, and as a compiler for it does."""
        return (
            _parted(self.groups, kind, Group.is_stacked),
            _parted(self.groups, kind, Group.is_stacked_in_traces),
        )

    def _parts(self, raw: RawTree) -> Parts:
        kind = "cpu" if self._first is None else _kind(raw[self._first])
        eager, traced = self._by_kind.get(kind) or self._both(kind)
        return traced if torch.compiler.is_compiling() else eager

    def evaluate(self, raw: RawTree, state: StateTree) -> dict[str, Tensor]:
        """Map raw to values; what no transform has passes through."""
        values: dict[str, Any] = dict(raw)
        stacks, single = self._parts(raw)
        for transform, names in stacks:
            found, _ = _evaluate(transform, names, raw, state)
            values.update(zip(names, found, strict=True))
        for transform, name in single:
            values[name] = transform.forward(raw[name], state.get(name, {}))
        return values

    def advance(self, raw: RawTree, state: StateTree) -> tuple[dict[str, Tensor], dict[str, State]]:
        """Update the state without gradients, and evaluate with the new one."""
        values: dict[str, Any] = dict(raw)
        new = dict(state)
        stacks, single = self._parts(raw)
        for transform, names in stacks:
            found, own = _evaluate(transform, names, raw, state, advance=True)
            values.update(zip(names, found, strict=True))
            new.update((n, s) for n, s in zip(names, own, strict=True) if n in state)
        for transform, name in single:
            own = state.get(name, {})
            if own and _evolves(transform):
                new[name] = own = updated(transform, raw[name], own)
            values[name] = transform.forward(raw[name], own)
        return values, new

    def update(self, raw: RawTree, state: StateTree) -> dict[str, State]:
        """Advance what evolves, without gradients."""
        new = dict(state)
        stacks, single = self._parts(raw)
        for transform, names in stacks:
            if _evolves(transform):
                own, _ = _advanced(transform, *_gathered(names, raw, state))
                new.update((name, s) for name, s in zip(names, own, strict=True) if s)
        for transform, name in single:
            if name in state and _evolves(transform):
                new[name] = updated(transform, raw[name], state[name])
        return new

    def refresh(self, raw: RawTree, state: StateTree) -> dict[str, State]:
        """Make exact what state approximates, leaf by leaf, without gradients."""
        new = dict(state)
        for group in self.groups:
            for name in group.names:
                if name in state:
                    new[name] = refreshed(group.transform, raw[name], state[name])
        return new


def _evaluate(
    transform: AnyTransform,
    names: Sequence[str],
    raw: RawTree,
    state: StateTree,
    *,
    advance: bool = False,
) -> tuple[Sequence[Tensor], Sequence[State]]:
    """Map raw to the values of a stacked group in one call, and with `advance` its state first."""
    raws, states, stack = _gathered(names, raw, state)
    if advance and _evolves(transform):
        states, stack = _advanced(transform, raws, states, stack)
    if stack is None:
        return list(map(transform.forward, raws, states)), states
    return _leaves(transform.forward_stacked(*stack)), states


def _leaves(stack: Tensor) -> Sequence[Tensor]:
    """The values of a stack.

    They are not views of it for autograd, which would refuse networks that write to their weights,
    as `Embedding(max_norm=1.0)` does. A copy, since backward of the map may need the stack itself.
    """
    if stack.ndim == 1 or stack.numel() == 0:
        return [leaf.clone() for leaf in stack.unbind()]
    own = stack.clone(memory_format=torch.contiguous_format)
    return _unsafe_split(own.flatten(0, 1), own.shape[1])


def _advanced(
    transform: AnyTransform, raws: Sequence[Raw], states: Sequence[State], stack: Stack | None
) -> tuple[Sequence[State], Stack | None]:
    """Update the state of a stacked group; what has none has nothing to update."""
    if not states[0]:
        return states, stack
    if stack is None:
        return list(map(partial(updated, transform), raws, states)), None
    raw, own = stack
    own = transform.update_stacked(detached(raw), detached(own))
    return _apart(own), (raw, own)


def _gathered(
    names: Sequence[str], raw: RawTree, state: StateTree
) -> tuple[Sequence[Raw], Sequence[State], Stack | None]:
    """Raw and state of a group, one by one and, unless they are of several kinds, as a stack."""
    raws, states = [raw[name] for name in names], [state.get(name, {}) for name in names]
    whole, own = _stack(raws), _stack(states)
    return raws, states, None if whole is None or own is None else (whole, own)


def _kind(raw: Any) -> str:
    """The kind of device that raw is on; nothing, where it has no tensors, is on any."""
    tensor = raw if isinstance(raw, Tensor) else next(iter(raw.values()), None)
    return "cpu" if tensor is None else tensor.device.type


def _evolves(transform: AnyTransform) -> bool:
    """Whether `update` may do anything."""
    return type(transform).update is not Transform.update


def _apart(stack: State) -> list[State]:
    columns = [tensor.unbind() for tensor in stack.values()]
    return [dict(zip(stack, leaf, strict=True)) for leaf in zip(*columns, strict=True)]


def _stack(leaves: Sequence[Any]) -> Any:
    """One stack, or one for each name; None if they are not plain tensors of one kind."""
    first = leaves[0]
    if isinstance(first, Tensor):
        return torch.stack(leaves) if _are_alike(leaves) else None  # pyright: ignore
    columns = {name: [leaf[name] for leaf in leaves] for name in cast("State", first)}
    if not all(map(_are_alike, columns.values())):
        return None
    return {name: torch.stack(column) for name, column in columns.items()}


def _are_alike(tensors: Sequence[Any]) -> bool:
    """Whether all are plain, since subclasses know better how they are stored, and of one kind.

    A stack with one trained leaf would make frozen ones look trained.
    """
    if torch.compiler.is_compiling():  # which does not know attrgetter
        looks: set[Any] = {(type(t), t.dtype, t.device, t.requires_grad) for t in tensors}
    else:
        looks = set(map(_look, tensors))
    return all(look[0] in _PLAIN for look in looks) and len({look[1:] for look in looks}) == 1
