"""State that evolves, as it was when a checkpoint around a shell computed the first time.

A shell in training mode advances its state in forward. A checkpoint around it calls that forward
again, in backward, when later forwards may have advanced the state further. So the state of the
first time is pinned to the checkpoint, which is found on the Python stack: it runs the forward.
Compiled code asks by an operator, which runs when the code does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import checkpoint

from funcparam.binding.modes import graph_task

_checkpoint = cast("Any", checkpoint)

_PINS = "funcparam_pins"


class _Region(NamedTuple):
    """A checkpoint that runs, and whether it computes again."""

    holder: Any
    again: bool


class _Pins:
    """What was pinned, in order, and how far each backward has got."""

    def __init__(self) -> None:
        self.states: list[list[Tensor]] = []
        self.read: dict[int, int] = {}

    def next(self) -> list[Tensor] | None:
        task = graph_task()
        number = self.read.get(task, 0)
        self.read[task] = number + 1
        return self.states[number] if number < len(self.states) else None


def is_checkpointed() -> bool:
    """Whether a checkpoint runs this, or backward does."""
    return graph_task() != -1 or next(_regions(), None) is not None


def settled(
    old: Sequence[Tensor], new: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The state of a call, and the state that stays.

    Both are the new one, unless a checkpoint computes again: then what it was the first time, and
    the old one. Where nothing was pinned, in backward, both are the old one.
    """
    found: Sequence[Tensor] | None = None
    inside: list[Any] = []
    for region in _regions():
        if region.again:
            pins: _Pins | None = getattr(region.holder, _PINS, None)
            found = pins and pins.next()
            break
        inside.append(region.holder)
    again = graph_task() != -1
    used = found or (old if again else new)
    for holder in inside:
        if not hasattr(holder, _PINS):
            setattr(holder, _PINS, _Pins())
        getattr(holder, _PINS).states.append([tensor.detach().clone() for tensor in used])
    return used, old if again else new


def settle(old: list[Tensor], new: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The same, also for a compiler."""
    if not torch.compiler.is_dynamo_compiling():
        return settled(old, new)
    found = settled_when_run(old, new)
    return found[: len(old)], found[len(old) :]


def _code_in(function: Any, name: str) -> CodeType | None:
    """The code of a function that is defined inside of another one."""
    consts = function.__code__.co_consts
    return next((c for c in consts if isinstance(c, CodeType) and c.co_name == name), None)


# from torch 2.15 on it is a function of its own that runs the forward
_FORWARD = getattr(_checkpoint, "_checkpoint_impl", inspect.unwrap(_checkpoint.checkpoint)).__code__
_AGAIN = _code_in(_checkpoint._checkpoint_hook.__init__, "unpack_hook")
_REENTRANT_FORWARD = _checkpoint.CheckpointFunction.forward.__code__
_REENTRANT_AGAIN = _checkpoint.CheckpointFunction.backward.__code__


def _regions() -> Iterator[_Region]:
    """The checkpoints that run, innermost first."""
    frame = sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        code = frame.f_code
        if code is _FORWARD and (made := frame.f_locals.get("gen")) is not None:
            yield _Region(made.gi_frame.f_locals["new_frame"], again=False)
        elif code is _AGAIN:
            yield _Region(frame.f_locals["frame"], again=True)
        elif code is _REENTRANT_FORWARD or code is _REENTRANT_AGAIN:
            yield _Region(frame.f_locals["ctx"], again=code is _REENTRANT_AGAIN)
        frame = frame.f_back


# A graph that is replayed on a GPU would not ask.
@torch.library.custom_op("funcparam::settled", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def settled_when_run(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """`settled`, for compiled code: one list after the other."""
    used, kept = settled(old, new)
    return [tensor.clone() for tensor in (*used, *kept)]


@settled_when_run.register_fake
def _(_: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (*new, *new)]


@settled_when_run.register_vmap
def _(_: Any, dims: Any, old: list[Tensor], new: list[Tensor]) -> Any:
    given = zip(old, new, *dims, strict=True)
    return settled_when_run([_batched(*each) for each in given], new), [*dims[1], *dims[1]]


def _batched(old: Tensor, new: Tensor, dim: int | None, new_dim: int | None) -> Tensor:
    """The old tensor with the batch dimension of the new one."""
    if new_dim is None or dim == new_dim:
        return old
    return old.unsqueeze(new_dim).expand_as(new) if dim is None else old.movedim(dim, new_dim)
