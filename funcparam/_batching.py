"""Equal leaves are stacked and mapped in one call, where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from funcparam._boundary import Entry, RawTree, StateTree
from funcparam.transforms._base import AnyTransform, State, Transform

_NOTHING: State = MappingProxyType({})

_PLAIN = frozenset({nn.Parameter, Tensor})


@dataclass(frozen=True)
class Group:
    """The leaves with one transform and equal shapes and dtypes."""

    transform: AnyTransform
    entries: tuple[Entry, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The leaves."""
        return tuple(entry.name for entry in self.entries)

    @property
    def obstacle(self) -> str:
        """Why the leaves are evaluated one by one; empty if they are stacked."""
        fewest, largest = self.transform.stacks_from, self.transform.stacks_up_to
        entries = prod(self.entries[0].signature.value.shape)
        if largest == 0:
            return "no gain measured"
        if len(self.entries) < fewest:
            return f"fewer than {fewest}"
        if entries > largest:
            return f"{entries} entries, no gain above {largest}"
        return ""


def plan(chosen: Sequence[Entry]) -> tuple[Group, ...]:
    """Group the leaves that can be evaluated together, in the order of their first ones."""
    groups: dict[Any, list[Entry]] = {}
    for entry in chosen:
        groups.setdefault((entry.transform, entry.signature), []).append(entry)
    return tuple(
        Group(cast("AnyTransform", entries[0].transform), tuple(entries))
        for entries in groups.values()
    )


def evaluate(
    transform: AnyTransform,
    names: Sequence[str],
    raw: RawTree,
    state: StateTree,
    *,
    advance: bool = False,
) -> tuple[Sequence[Tensor], Sequence[State]]:
    """Map raw to the values of a stacked group in one call, and with `advance` its state first."""
    raws, states = [raw[name] for name in names], [state.get(name, _NOTHING) for name in names]
    advance = advance and evolves(transform) and len(states[0]) > 0
    stack, own = _stack(raws), _stack(states)
    if stack is None or own is None:
        if advance:
            states = list(map(transform.update, raws, states))
        return list(map(transform.forward, raws, states)), states
    if advance:
        with torch.no_grad():
            own = transform.update_stacked(stack, own)
            states = _apart(own)
    return transform.forward_stacked(stack, own).unbind(), states


def update(
    transform: AnyTransform, names: Sequence[str], raw: RawTree, state: StateTree
) -> Sequence[State]:
    """Advance the state of a stacked group, in one call."""
    raws, states = [raw[name] for name in names], [state[name] for name in names]
    if not evolves(transform):
        return states
    stack, own = _stack(raws), _stack(states)
    if stack is None or own is None:
        return list(map(transform.update, raws, states))
    return _apart(transform.update_stacked(stack, own))


def evolves(transform: AnyTransform) -> bool:
    """Whether `update` may do anything."""
    return type(transform).update is not Transform.update


def _apart(stack: State) -> list[State]:
    columns = [tensor.unbind() for tensor in stack.values()]
    return [dict(zip(stack, leaf, strict=True)) for leaf in zip(*columns, strict=True)]


def _stack(leaves: Sequence[Any]) -> Any:
    """One stack, or one for each name; None if they are not plain tensors of one kind."""
    first = leaves[0]
    if not isinstance(first, Mapping):
        return torch.stack(leaves) if _are_alike(leaves) else None  # pyright: ignore
    columns = {name: [leaf[name] for leaf in leaves] for name in cast("State", first)}
    if not all(map(_are_alike, columns.values())):
        return None
    return {name: torch.stack(column) for name, column in columns.items()}


def _are_alike(tensors: Sequence[Any]) -> bool:
    """Whether all are plain, since subclasses know better how they are stored, and of one kind."""
    kinds = set(map(type, tensors))
    return kinds <= _PLAIN and len({(t.dtype, t.device) for t in tensors}) == 1
