from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])

_LOW = (torch.bfloat16, torch.float16)


def full_precision(method: Method) -> Method:
    """Run a transform's method with autocast off and half-precision tensors in float32.

    LU, QR and the exponential do not exist in half precision on all devices, and lose the
    constraint where they do. Tensors come back in the dtype that the first argument, raw or a
    value, had.

    Example:
        >>> import torch
        >>> from funcparam.transforms import full_precision
        >>> class Inverse:
        ...     @full_precision
        ...     def forward(self, raw, state):
        ...         return torch.linalg.inv(raw)
        >>> Inverse().forward(torch.eye(2, dtype=torch.bfloat16), {}).dtype
        torch.bfloat16
    """

    @wraps(method)
    def run(self: Any, first: Any, *rest: Any, **kwargs: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else next(iter(first.values()), None)
        if tensor is None:
            return method(self, first, *rest, **kwargs)
        dtype = tensor.dtype
        if _autocast_is_on(tensor):
            with autocast_off(tensor):
                return run(self, first, *rest, **kwargs)
        if dtype not in _LOW:
            return method(self, first, *rest, **kwargs)
        args = (_cast(arg, dtype, torch.float32) for arg in (first, *rest))
        return _cast(method(self, *args, **kwargs), torch.float32, dtype)

    return cast("Method", run)


def autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block in which operations on the device of `tensor` keep their dtype."""
    if _autocast_is_on(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()


def widened(tree: Any) -> Any:
    """The tree with half-precision tensors in float32."""
    for dtype in _LOW:
        tree = _cast(tree, dtype, torch.float32)
    return tree


def _autocast_is_on(tensor: Tensor) -> bool:
    device = "cpu" if tensor.is_cpu else tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _cast(tree: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(new) if tree.dtype == old else tree
    if isinstance(tree, tuple):
        return tuple(_cast(item, old, new) for item in cast("tuple[Any, ...]", tree))
    if isinstance(tree, Mapping):
        items = cast("Mapping[str, Any]", tree).items()
        return {key: _cast(item, old, new) for key, item in items}
    return tree
