from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_LOW = (torch.bfloat16, torch.float16)


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` with autocast off and low-precision arguments in float32.

    LU, QR and the exponential do not exist in half precision on all devices, and lose the
    constraint where they do. Tensors come back in the dtype that went in.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = _tensors(args)
        low = next((t.dtype for t in tensors if t.dtype in _LOW), None)
        with _autocast_off(tensors):
            if low is None:
                return function(*args, **kwargs)
            raised = cast("Callable[..., T]", function)(*_cast(args, low, torch.float32), **kwargs)
        return _cast(raised, torch.float32, low)

    return run


def _tensors(args: tuple[object, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, Mapping):
            found.extend(cast("Mapping[str, Tensor]", arg).values())
    return found


def _autocast_off(tensors: list[Tensor]) -> AbstractContextManager[Any]:
    device = tensors[0].device.type if tensors else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _cast(tree: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(new) if tree.dtype == old else tree
    if isinstance(tree, tuple):
        return tuple(_cast(item, old, new) for item in cast("tuple[Any, ...]", tree))
    if isinstance(tree, Mapping):
        items = cast("Mapping[str, Any]", tree).items()
        return {key: _cast(item, old, new) for key, item in items}
    return tree
