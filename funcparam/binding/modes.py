"""The modes of torch that a value depends on."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

_transforms_active: Any = getattr(
    torch._C,  # pyright: ignore[reportPrivateUsage]
    "_are_functorch_transforms_active",
    lambda: True,
)
_graph_task: Any = getattr(
    torch._C,  # pyright: ignore[reportPrivateUsage]
    "_current_graph_task_id",
    lambda: -1,
)


def graph_task() -> int:
    """Which backward runs this; -1 if none does."""
    return _graph_task()


def is_plain_eager() -> bool:
    """Whether nothing traces or transforms what runs here."""
    return not (
        torch.compiler.is_compiling()
        or _transforms_active()
        or getattr(forward_ad, "_current_level", 0) >= 0
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )


def fx_tracer(args: Any, kwargs: Any) -> Any:
    """What traces this symbolically, with torch.fx; None if nothing does.

    Raises:
        TypeError: it began with this very module, whose arguments it does not know.
    """
    if isinstance(args, torch.fx.Proxy):
        raise TypeError(
            "torch.fx takes a Parametrized as one module of a graph: trace a module around it, such"
            " as torch.nn.Sequential(model), or model.fold()"
        )
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.fx.Proxy):
            return x.tracer
    return None


class Modes:
    """Whether there are gradients, and autocast on some kinds of devices, when this is made."""

    def __init__(self, devices: Iterable[str]) -> None:
        self.grad = torch.is_grad_enabled()
        kinds = filter(torch.amp.is_autocast_available, devices)
        self._autocast = [(kind, *_autocast(kind)) for kind in kinds]

    def entered(self) -> AbstractContextManager[None]:
        """A block in these modes, in which tensors count what is written to them."""
        changed = any(_autocast(kind) != found for kind, *found in self._autocast)
        if changed or torch.is_inference_mode_enabled() or torch.is_grad_enabled() != self.grad:
            return self._entered()
        return nullcontext()

    @contextmanager
    def _entered(self) -> Generator[None]:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, enabled, dtype in self._autocast:
                if _autocast(kind) != [enabled, dtype]:
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield


def _autocast(kind: str) -> list[Any]:
    return [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
