"""What torch does not offer in public; the only file that takes it, and stands its absence."""

from __future__ import annotations

import copyreg
import importlib
import sys
from collections.abc import Callable
from enum import Enum
from types import FrameType, FunctionType
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])

_MISSING = object()


def _find(*places: str) -> Any:
    """The first of the dotted names that this version of torch has; else `_MISSING`."""
    for place in places:
        module, _, name = place.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return _MISSING


_OPAQUE = _find("torch._opaque_base.OpaqueBase", "torch._custom_class_base.CustomClassBase")
_IS_REFERENCE = _find(
    "torch._library.opaque_object.is_opaque_symbolic_type",
    "torch._library.opaque_object.is_opaque_reference_type",
)
_IS_WRAPPER = _find("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
_SWAP = _find("torch.nn.utils._named_member_accessor.swap_tensor")
_TRACING = _find("torch._guards.TracingContext")
_PEEK = _find("torch._C._functorch.peek_interpreter_stack")
_SET_STRATEGY = _find("torch._C._dynamo.eval_frame.set_code_exec_strategy")
_STRATEGY = _find("torch._C._dynamo.eval_frame._FrameExecStrategy")
_ACTION = _find("torch._C._dynamo.eval_frame._FrameAction")

# What code that looks into parametrizations asks for, and subclasses.
TORCHS_PARTS = TorchOrthogonal, TorchSpectralNorm, TorchWeightNorm = tuple(
    cast("type[nn.Module]", _find(f"torch.nn.utils.parametrizations.{name}"))
    for name in ("_Orthogonal", "_SpectralNorm", "_WeightNorm")
)
ORTHOGONAL_MAPS = cast("type[Enum]", _find("torch.nn.utils.parametrizations._OrthMaps"))


def unscripted(forward: Function) -> Function:
    """`torch.jit.unused`: TorchScript leaves it alone."""
    return cast("Function", torch.jit.unused(forward))  # pyright: ignore[reportPrivateImportUsage]


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` runs."""
    return bool(torch.jit.is_tracing())  # pyright: ignore[reportPrivateImportUsage]


@torch.compiler.assume_constant_result  # pyright: ignore[reportUntypedFunctionDecorator]
def trace() -> str:
    """A name for the trace that `torch.compile` is in, another one for each."""
    context = None if _TRACING is _MISSING else _TRACING.try_get()
    own = cast("dict[str, str]", {} if context is None else vars(context))
    return own.setdefault("funcparam", uuid4().hex)


@torch.compiler.assume_constant_result  # pyright: ignore[reportUntypedFunctionDecorator]
def is_transforming() -> bool:
    """Whether this runs inside of a `torch.func` transform; a compiler knows it for a constant."""
    return _PEEK is not _MISSING and _PEEK() is not None


def not_compiled(reason: str) -> Callable[[Function], Function]:
    """`torch.compiler.disable` in its form that costs little where nothing is compiled."""
    return cast("Any", torch.compiler.disable)(recursive=False, reason=reason)


def run_eagerly_alone(function: FunctionType) -> None:
    """Let `torch.compile` trace `function` inside of what calls it, but not by itself."""
    if _MISSING not in (_SET_STRATEGY, _STRATEGY, _ACTION):
        skip = _STRATEGY(_ACTION.SKIP, _ACTION.SKIP)
        _SET_STRATEGY(function.__code__, skip)


def is_opaque(thing: object) -> bool:
    """Whether `thing` is one of the objects that torch takes in a graph like a tensor."""
    return _OPAQUE is not _MISSING and isinstance(thing, _OPAQUE)


def is_opaque_reference(thing: object) -> bool:
    """Whether it is an opaque object that is held by reference, and so can be a raw element."""
    return is_opaque(thing) and (_IS_REFERENCE is _MISSING or bool(_IS_REFERENCE(type(thing))))


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Whether `tensor` is a subclass that holds other tensors, which `set_` cannot fill."""
    return _IS_WRAPPER is not _MISSING and bool(_IS_WRAPPER(tensor))


def slot_names(cls: type) -> list[str]:
    """The names of all slots of a class."""
    return cast("list[str]", getattr(copyreg, "_slotnames")(cls) or [])  # noqa: B009


def exchange(depth: int) -> FrameType | None:
    """The call of `torch.func.functional_call` that assigns to an attribute; None if it is not one.

    It puts values in and takes them out again by assignments, both from one and the same frame.

    Args:
        depth: how far up the assignment was made.
    """
    frame = sys._getframe(depth + 1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code.co_name == "__setattr__":
        frame = frame.f_back
    if _SWAP is _MISSING or frame is None or frame.f_code is not _SWAP.__code__:
        return None
    while frame is not None and frame.f_code.co_filename == _SWAP.__code__.co_filename:
        frame = frame.f_back
    if frame is not None and frame.f_code.co_name == "_swap_state":  # functorch.make_functional
        frame = frame.f_back
    return frame


def is_traced_exchange() -> bool:
    """Whether `functional_call` assigns to an attribute in a function that was compiled."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    for _ in range(12):
        if frame is None or _SWAP is _MISSING:
            return False
        if frame.f_code.co_filename == _SWAP.__code__.co_filename:
            return True
        frame = frame.f_back
    return False


def tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The dictionaries of a module that a registration changes."""
    own = vars(module)
    return own["_parameters"], own["_buffers"], own["_modules"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on this kind of device; None if it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def version(tensor: Tensor) -> int:
    """How often `tensor` was written to; -1 if it does not count."""
    return -1 if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]
