"""Checkpoints inside of a bound network take the binding along, and put it back to compute again.

Between a checkpoint's two computations a network gets its own tensors back, so the second one needs
to know what was bound in the first. PyTorch has no place to ask at (`context_fn` is given by the
network, which nobody wants to edit), so the two things that it makes for a checkpoint are watched
for as long as anything is bound, and only then: nothing of torch is changed in between. Other
threads, where nothing is bound, see no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from threading import Lock, local
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import checkpoint

_checkpoint = cast("Any", checkpoint)


class Bound(Protocol):
    """What is bound, and can be bound again with other tensors in the place of some."""

    places: Any
    tensors: list[Any]

    def written(self) -> Mapping[str, Any]:
        """What the network has written since, if anybody wants to know."""
        ...

    def again(self, instead: Mapping[int, Tensor]) -> AbstractContextManager[Any]:
        """The block, once more."""
        ...


class _Thread(local):
    """What this thread has bound, innermost last."""

    def __init__(self) -> None:
        self.bound: list[Bound] = []


class _Watch:
    """Has torch's checkpoints made by `_frame` and `_reentrant` while anything is bound."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self.frame: Any = None

    def start(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self.frame = _checkpoint._CheckpointFrame
                _checkpoint._CheckpointFrame = _frame
                _checkpoint.CheckpointFunction.apply = classmethod(_reentrant)

    def stop(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                _checkpoint._CheckpointFrame = self.frame
                del _checkpoint.CheckpointFunction.apply


_thread = _Thread()
_watch = _Watch()


def push(binding: Bound) -> None:
    """Note what is bound."""
    if not _thread.bound:
        _watch.start()
    _thread.bound.append(binding)


def pop() -> None:
    """Note that the innermost binding has ended."""
    _thread.bound.pop()
    if not _thread.bound:
        _watch.stop()


def is_bound(net: nn.Module) -> bool:
    """Whether this thread has bound something in a network."""
    return any(binding.places.net is net for binding in _thread.bound)


def expect_unwritten(net: nn.Module) -> None:
    """Raise where a block around this has values of a network that were written to."""
    for binding in _thread.bound:
        if binding.places.net is net:
            for name in binding.written():
                raise RuntimeError(
                    f"{name!r} was written to in a block around this one, which would use its old"
                    " value: end that block first"
                )


def is_bound_around(net: nn.Module) -> bool:
    """Whether it is bound by more than the innermost block."""
    return sum(binding.places.net is net for binding in _thread.bound) > 1


def _frame(recompute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What torch keeps of a checkpoint whose second computation is not differentiated."""
    bound = tuple(_thread.bound)

    def again(*inputs: Any) -> Any:
        with ExitStack() as stack:
            for binding in bound:
                stack.enter_context(binding.again({}))
            return recompute(*inputs)

    return _watch.frame(again if bound else recompute, *args, **kwargs)


def _reentrant(kind: type[Function], function: Callable[..., Any], *args: Any) -> Any:
    """A checkpoint whose second computation is differentiated: what is bound is an input of it."""
    bound = tuple(_thread.bound)
    apply = cast("Any", super(_checkpoint.CheckpointFunction, kind)).apply
    if not (bound and torch.is_grad_enabled()):
        return apply(function, *args)
    preserve, *rest = args
    tensors = _differentiable([t for binding in bound for t in binding.tensors])

    def again(*inputs: Any) -> Any:
        mine = dict(zip(map(id, tensors), inputs, strict=False))
        with ExitStack() as stack:
            for binding in bound:
                stack.enter_context(binding.again(mine))
            return function(*inputs[len(tensors) :])

    return apply(again, preserve, *tensors, *rest)


def _differentiable(tensors: Sequence[Any]) -> list[Tensor]:
    each = {id(t): t for t in tensors if isinstance(t, Tensor) and t.requires_grad}
    return list(each.values())
