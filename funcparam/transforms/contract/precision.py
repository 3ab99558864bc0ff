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
    """Run a transform's method with autocast off, in the widest precision of its tensors.

    It is float32 at least: LU, QR and the exponential do not exist in half precision on all
    devices, and lose the constraint where they do. State, and raw that is moved, come back in the
    dtypes that they had. Anything else does in that of the first argument, raw or a value; the
    value of an adapter in that of the weight, state `"base"`.

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
        if _autocast_is_on(tensor):
            with autocast_off(tensor):
                return run(self, first, *rest, **kwargs)
        state: Any = rest[0] if rest else kwargs.get("state") or {}
        wide = _precision(tensor, first, state)
        if wide is None:
            return method(self, first, *rest, **kwargs)
        out = method(self, *_at((first, *rest), wide), **_at(kwargs, wide))
        if isinstance(out, tuple):
            raw, own = cast("tuple[Any, Any]", out)
            return _narrowed(raw, first, tensor.dtype), _narrowed(own, state, tensor.dtype)
        kept = getattr(self, "kept_weight", _no_weight)(state)
        return _narrowed(out, state, tensor.dtype if kept is None else kept.dtype)

    return cast("Method", run)


def _no_weight(state: Any) -> Tensor | None:
    return None


def autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block in which operations on the device of `tensor` keep their dtype."""
    if _autocast_is_on(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()


def widened(tree: Any) -> Any:
    """The tree with half-precision tensors in float32."""
    if isinstance(tree, Tensor):
        return tree.float() if tree.dtype in _LOW else tree
    return _mapped(widened, tree)


def _precision(tensor: Tensor, raw: Any, state: Any) -> torch.dtype | None:
    """What to compute in, unless all tensors are in it already, as the first of raw is."""
    first = tensor.dtype
    if first not in _LOW and (raw is tensor or _are_all(first, raw)) and _are_all(first, state):
        return None
    both = [*_tensors(raw), *_tensors(state)]
    found = {_real(each.dtype) for each in both if each.is_floating_point() or each.is_complex()}
    if len(found) < 2 and found.isdisjoint(_LOW):
        return None
    return torch.float64 if torch.float64 in found else torch.float32


def _are_all(dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> bool:
    for tensor in tensors.values():  # noqa: SIM110 - a generator takes three times as long
        if tensor.dtype != dtype:
            return False
    return True


def _tensors(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else list(tree.values())


def _real(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.complex64:
        return torch.float32
    return torch.float64 if dtype == torch.complex128 else dtype


def _at(tree: Any, real: torch.dtype) -> Any:
    """The tree with real tensors of this dtype, and complex ones of the one with such parts."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            return tree.to(real)
        if tree.is_complex() and real not in _LOW:  # there is no complex half
            return tree.to(torch.complex128 if real == torch.float64 else torch.complex64)
        return tree
    return _mapped(lambda item: _at(item, real), tree)


def _narrowed(tree: Any, old: Any, new: torch.dtype) -> Any:
    """The tree in the dtypes that its tensors had in `old`, and others in that of `new`."""
    if isinstance(tree, Mapping):
        olds = cast("Mapping[str, Any]", old if isinstance(old, Mapping) else {})
        items = cast("Mapping[str, Any]", tree).items()
        return {key: _narrowed(item, olds.get(key), new) for key, item in items}
    return _at(tree, _real(old.dtype if isinstance(old, Tensor) else new))


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, tuple):
        return tuple(map(function, cast("tuple[Any, ...]", tree)))
    if isinstance(tree, Mapping):
        items = cast("Mapping[str, Any]", tree).items()
        return {key: function(item) for key, item in items}
    return tree


def _autocast_is_on(tensor: Tensor) -> bool:
    # is_cpu is quicker, but stays in a compiled graph, as a use of the tensor that leads to nothing
    is_cpu = not torch.compiler.is_compiling() and tensor.is_cpu
    device = "cpu" if is_cpu else tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)
