"""The values of one call of a network, each made when the network reads it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcparam.binding.modes import Modes, is_plain_eager
from funcparam.binding.places import Place, read_later
from funcparam.binding.recent import Recent
from funcparam.binding.recompute import Recomputed, version
from funcparam.parametrization.boundary import RawTree, StateTree
from funcparam.transforms.contract.base import AnyTransform, Raw, State

Join = Callable[[Sequence[Tensor]], tuple[Raw, State]]
"""From one list of tensors back to raw and state."""


class Spans(NamedTuple):
    """How long to keep values, as calls have learnt it, in forward and in backward."""

    forward: dict[str, int]
    backward: dict[str, int]


class _Made(NamedTuple):
    value: Tensor
    version: int


class Reading:
    """The values of one call.

    They are made in the modes in which the call began, so they are what `p(raw, state)` gives
    there. If gradients are on, they are made again in backward.
    """

    def __init__(
        self,
        transforms: Mapping[str, AnyTransform],
        raw: RawTree,
        state: StateTree,
        spans: Spans,
    ) -> None:
        self._transforms = transforms
        self._raw = raw
        self._state = state
        firsts = (_first(raw[name], state.get(name, {})) for name in transforms)
        self._modes = Modes({tensor.device.type for tensor in firsts})
        self._recomputed = Recomputed(spans.backward) if self._modes.grad else None
        self._recent: Recent[_Made] = Recent(spans.forward, _is_untouched)

    @contextmanager
    def at(self, places: Sequence[Place]) -> Generator[None]:
        """Let the modules at `places` read them inside the block."""
        recomputed = self._recomputed
        through = nullcontext() if recomputed is None else recomputed.looking_through()
        try:
            with read_later(places, self._read), through:
                yield
        finally:
            self._recent.clear()

    def _read(self, name: str, owner: nn.Module) -> Tensor:
        return self._recent.get(name, name, owner, partial(self._make, name, owner)).value

    def _make(self, name: str, owner: nn.Module) -> _Made:
        transform, raw = self._transforms[name], self._raw[name]
        state = self._state.get(name, {})
        if self._recomputed is not None and is_plain_eager():
            sources, join = _split(raw, state)
            compute = partial(_compute, transform, join, self._modes)
            with torch.enable_grad():
                value = self._recomputed.make(name, owner, compute, sources)
        else:
            with self._modes.entered():
                value = transform.forward(raw, state)
            if not is_plain_eager():  # read in a transform, and made as if outside of it
                value = torch.func.debug_unwrap(value)
        return _Made(value, version(value))


def _first(raw: Raw, state: State) -> Tensor:
    return raw if isinstance(raw, Tensor) else next(iter((raw or state).values()))


def _split(raw: Raw, state: State) -> tuple[list[Tensor], Join]:
    """Raw and state as one list, and how to get them back."""
    own = [raw] if isinstance(raw, Tensor) else list(raw.values())
    names = None if isinstance(raw, Tensor) else list(raw)
    return [*own, *state.values()], partial(_join, names, list(state))


def _join(
    names: list[str] | None, state_names: list[str], tensors: Sequence[Tensor]
) -> tuple[Raw, State]:
    n = 1 if names is None else len(names)
    raw = tensors[0] if names is None else dict(zip(names, tensors[:n], strict=True))
    return raw, dict(zip(state_names, tensors[n:], strict=True))


def _compute(
    transform: AnyTransform, join: Join, modes: Modes, sources: Sequence[Tensor]
) -> Tensor:
    raw, state = join(sources)
    with modes.entered():
        return transform.forward(raw, state)


def _is_untouched(made: _Made) -> bool:
    return version(made.value) == made.version
