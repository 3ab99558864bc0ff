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
    constraint where they do. State, and raw that is moved, come back in the dtypes that they had,
    anything else in that of the first argument, raw or a value.

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
        if not isinstance(first, Tensor) and len(first) == 0:
            return method(self, first, *rest, **kwargs)
        tensor = first if isinstance(first, Tensor) else next(iter(first.values()))
        low = tensor.dtype
        if _autocast_is_on(tensor):
            with autocast_off(tensor):
                return run(self, first, *rest, **kwargs)
        if low not in _LOW:
            return method(self, first, *rest, **kwargs)
        out = method(self, *widened((first, *rest)), **widened(kwargs))
        state = rest[0] if rest else kwargs.get("state")
        if isinstance(out, tuple):
            raw, own = cast("tuple[Any, Any]", out)
            return _narrowed(raw, first, low), _narrowed(own, state, low)
        return _narrowed(out, state, low)

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


def _narrowed(tree: Any, old: Any, low: torch.dtype) -> Any:
    """The tree in the dtypes that its tensors had in `old`, and what is new in the low one."""
    if isinstance(tree, Mapping):
        olds = cast("Mapping[str, Any]", old if isinstance(old, Mapping) else {})
        items = cast("Mapping[str, Any]", tree).items()
        return {key: _narrowed(item, olds.get(key), low) for key, item in items}
    return _cast(tree, torch.float32, old.dtype if isinstance(old, Tensor) else low)


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
