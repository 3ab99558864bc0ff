"""How the values of a parametrization are made for a call, in as little memory as that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from functools import partial
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import checkpoint

from funcparam.binding.modes import is_plain_eager
from funcparam.binding.reading import Reading, modes_of
from funcparam.parametrization.boundary import Entry, RawTree, StateTree
from funcparam.parametrization.parametrization import Parametrization
from funcparam.transforms.contract.base import AnyTransform, State
from funcparam.transforms.contract.steps import updated

_checkpoint = partial(
    cast("Any", checkpoint.checkpoint),  # pyright: ignore[reportUnknownMemberType]
    use_reentrant=False,
    preserve_rng_state=False,
)

SMALLEST = 2**19
"""Bytes from which on a value is made when it is read: at 384 x 384 in float32 that costs nothing
measurable, at 256 x 256 up to a third of an evaluation."""


class Values(NamedTuple):
    """What a network is called with: tensors, and what makes the others when they are read."""

    tensors: dict[str, Tensor]
    reading: Reading | None = None


class Evaluation:
    """How the values of `p` are made.

    Args:
        p: the parametrization.
        parameters: which of its names are parameters, and not buffers.
        recompute: whether large values are dropped in training too.
    """

    def __init__(
        self, p: Parametrization[dict[str, Tensor]], parameters: Set[str], *, recompute: bool
    ) -> None:
        self._p = p
        self._recompute = recompute
        later = _later(p, parameters)
        self._transforms = {e.name: cast("AnyTransform", e.transform) for e in later}
        rest = tuple(entry for entry in p.entries if entry not in later)
        self._rest: Parametrization[dict[str, Tensor]] = Parametrization(rest, None)
        self.at_once = [entry.name for entry in rest]
        self._saves = _saves(later)

    def values(self, raw: RawTree, state: StateTree) -> Values:
        """What to bind."""
        if self._is_late():
            return self._when_read(self._rest(*self._of_the_rest(raw, state)), raw, state)
        if self._is_told():
            return self._as_told(self._rest(*self._of_the_rest(raw, state)), raw, state)
        return Values(self._p(raw, state))

    def advanced(self, raw: RawTree, state: StateTree) -> tuple[Values, dict[str, State]]:
        """The same after a step of what evolves, and the new state."""
        late = self._is_late()
        if not (late or self._is_told()):
            values, new = self._p.advance(raw, state)
            return Values(values), new
        others, new = self._rest.advance(*self._of_the_rest(raw, state))
        for name, transform in self._transforms.items():
            if name in state:
                new[name] = updated(transform, raw[name], state[name])
        make = self._when_read if late else self._as_told
        return make(others, raw, new), new

    def _is_late(self) -> bool:
        saves = self._recompute if torch.is_grad_enabled() else self._saves
        return saves and len(self._transforms) > 0 and is_plain_eager()

    def _is_told(self) -> bool:
        """Whether a compiler is told to make values again."""
        return self._recompute and len(self._transforms) > 0 and torch.compiler.is_compiling()

    def _when_read(self, others: dict[str, Tensor], raw: RawTree, state: StateTree) -> Values:
        modes = modes_of(self._transforms, raw, state)
        return Values(others, Reading(self._transforms, raw, state, modes))

    def _as_told(self, others: dict[str, Tensor], raw: RawTree, state: StateTree) -> Values:
        """All values. A compiler chooses what backward gets; of a checkpoint's inside, nothing."""
        for name, transform in self._transforms.items():
            others[name] = cast(
                "Tensor", _checkpoint(transform.forward, raw[name], state.get(name, {}))
            )
        for entry in self._p.entries:
            others.update(dict.fromkeys(entry.names, others[entry.name]))
        return Values(others)

    def _of_the_rest(self, raw: RawTree, state: StateTree) -> tuple[RawTree, StateTree]:
        """The part of raw and state of the values that are made at once; all of it was checked."""
        self._p._check(raw, state)  # pyright: ignore[reportPrivateUsage]
        names = [entry.name for entry in self._rest.entries]
        own = {name: state[name] for name in names if name in state}
        return {name: raw[name] for name in names}, own


def _later(p: Parametrization[dict[str, Tensor]], parameters: Set[str]) -> list[Entry]:
    """The parameters that are worth it: large ones, which no stack takes on any device so far."""
    groups = p._plan.groups  # pyright: ignore[reportPrivateUsage]
    alone = {name for group in groups if group.obstacle("cpu") for name in group.names} & parameters
    alone -= p._plan.connected  # pyright: ignore[reportPrivateUsage]
    return [e for e in p.entries if e.name in alone and _bytes(e) >= SMALLEST]


def _saves(later: list[Entry]) -> bool:
    """Whether it takes less memory to hold the values of one module than all of them."""
    sizes = {name: _bytes(entry) for entry in later for name in entry.names}
    owners: Counter[str] = Counter()
    for name, size in sizes.items():
        owners[name.rpartition(".")[0]] += size
    return sum(map(_bytes, later)) > max(owners.values(), default=0)


def _bytes(entry: Entry) -> int:
    value = entry.signature.value
    return prod(value.shape) * value.dtype.itemsize
