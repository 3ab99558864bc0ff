"""The values of one call of a network, each made when the network reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from funcparam.binding.modes import Modes, is_plain_eager
from funcparam.binding.places import Place
from funcparam.binding.recompute import Recent, Recomputed, Saved, version
from funcparam.binding.slots import the_one
from funcparam.binding.tables import read_later
from funcparam.parametrization.boundary import RawTree, StateTree
from funcparam.transforms.contract.base import AnyTransform, Raw, State

Join = Callable[[Sequence[Tensor]], tuple[Raw, State]]
"""From one list of tensors back to raw and state."""


_get = cast("Any", dict.get)  # which makes no value


class _Made(NamedTuple):
    value: Tensor
    version: int


class Reading:
    """The values of one call.

    They are made in the modes in which the call began, so they are what `p(raw, state)` gives
    there. If gradients are on, they are made again in backward.
    """

    def __init__(
        self, transforms: Mapping[str, AnyTransform], raw: RawTree, state: StateTree, modes: Modes
    ) -> None:
        self._transforms = transforms
        self._raw = raw
        self._state = state
        self._modes = modes
        self._recomputed = Recomputed() if modes.grad else None
        self._recent: Recent[_Made] = Recent(_is_untouched)
        self._through = True
        self._ghosts: list[tuple[str, Tensor, int]] = []
        self._places: Sequence[tuple[str, Place]] = ()

    def finds(self, at: Mapping[str, Sequence[Place]]) -> bool:
        """Learn where the network reads each; False if one is nowhere."""
        self._places = [(name, place) for name in self._transforms for place in at.get(name, ())]
        return all(name in at for name in self._transforms)

    def again(self) -> Reading:
        """The same for a checkpoint that computes again, whose own hooks see what is saved."""
        same = Reading(self._transforms, self._raw, self._state, self._modes)
        same._places, same._through = self._places, False
        return same

    def block(self) -> ExitStack:
        """A block in which the network reads them."""
        with ExitStack() as stack:
            stack.callback(self._recent.clear)
            if self._recomputed is not None and self._through:
                stack.enter_context(self._recomputed.looking_through())
            stack.enter_context(read_later(self._places, self._read))
            return stack.pop_all()

    def written(self) -> dict[str, Any]:
        """The values that were written to, and what was put in the place of one.

        Raises:
            RuntimeError: a value was written to when it was dropped already.
        """
        found = {str(name): made.value for name, made in self._recent.undroppable().items()}
        for name, ghost, before in self._ghosts:
            if version(ghost) != before and name not in found:
                raise RuntimeError(
                    f"{name!r} was written to after the network had read another weight, when its"
                    " value was dropped: write to one weight after the other"
                )
        there: dict[str, list[Any]] = {}
        for name, place in self._places:
            there.setdefault(name, []).append(_get(place.entries(), place.key))
        put = {name: the_one(name, own) for name, own in there.items() if any(map(_is_some, own))}
        return found | put

    def _read(self, name: str, owner: nn.Module) -> Tensor:
        return self._recent.get(name, owner, partial(self._make, name, owner)).value

    def _make(self, name: str, owner: nn.Module) -> _Made:
        transform, raw = self._transforms[name], self._raw[name]
        state = self._state.get(name, {})
        if self._recomputed is not None and is_plain_eager():
            sources, join = _split(raw, state)
            compute = partial(_compute, transform, join, self._modes)
            # A checkpoint around the reader counts what is saved: nothing of a map is.
            with torch.enable_grad(), saved_tensors_hooks(Saved, Saved.get):
                value = self._recomputed.make(name, owner, compute, sources)
        else:
            with self._modes.entered():
                value = transform.forward(raw, state)
            if not is_plain_eager():  # read in a transform, and made as if outside of it
                value = torch.func.debug_unwrap(value)
        if is_plain_eager():
            ghost = value.detach()
            ghost.data = value.new_empty(0)  # it keeps no memory, and counts writes to the value
            self._ghosts.append((name, ghost, version(ghost)))
        return _Made(value, version(value))


def _is_some(tensor: Any) -> bool:
    return tensor is not None


def modes_of(names: Mapping[str, Any], raw: RawTree, state: StateTree) -> Modes:
    """The modes of now, on the devices of these weights."""
    firsts = (_first(raw[name], state.get(name, {})) for name in names)
    return Modes({tensor.device.type for tensor in firsts})


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
