"""Weight norm in one kernel forward and one backward, where PyTorch has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from funcparam.transforms._linalg import linalg

_forward: Any = getattr(torch, "_weight_norm_interface", None)
_backward: Any = torch.ops.aten._weight_norm_interface_backward.default
_transforms_active: Any = getattr(
    torch._C,  # pyright: ignore[reportPrivateUsage]
    "_are_functorch_transforms_active",
    lambda: True,
)


def can_fuse(magnitude: Tensor, direction: Tensor) -> bool:
    """Whether the kernels take these tensors.

    They have no rules for `torch.func` transforms, and a compiler fuses by itself.
    """
    return (
        not _transforms_active()
        and direction.dtype in (torch.float32, torch.float64)
        and type(direction) in (nn.Parameter, Tensor)
        and type(magnitude) in (nn.Parameter, Tensor)
        and direction.is_contiguous()
        and not direction.is_meta
        and direction.numel() > 0
        and not torch.compiler.is_compiling()
    )


def fused_weight_norm(magnitude: Tensor, direction: Tensor, dim: int) -> Tensor:
    """WeightNorm's value, with the norm over all dimensions but `dim`, the first or last one."""
    if torch.is_grad_enabled():
        return _FusedWeightNorm.apply(magnitude, direction, dim)  # pyright: ignore
    return _forward(direction, magnitude, dim)[0]


class _FusedWeightNorm(torch.autograd.Function):
    """PyTorch's own kernels have wrong second derivatives; those are composed here."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor, dim: int) -> Tensor:  # pyright: ignore
        value, norm = _forward(v, g, dim)
        ctx.dim = dim
        ctx.save_for_backward(g, v, norm)
        ctx.save_for_forward(g, v)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, v, norm = ctx.saved_tensors
        (G,) = grads
        if not torch.is_grad_enabled() and not _transforms_active():
            grad_v, grad_g = _backward(G.contiguous(), v, g, norm, ctx.dim)
            return grad_g, grad_v, None
        unit, norm, others = _unit(v, ctx.dim)
        grad_g = (G * unit).sum(others, keepdim=True)
        return grad_g, (G - grad_g * unit) * (g / norm), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        g, v = ctx.saved_tensors
        dg, dv, _ = tangents
        unit, norm, others = _unit(v, ctx.dim)
        moved = torch.zeros_like(v) if dg is None else dg * unit
        if dv is None:
            return moved
        return moved + (dv - (dv * unit).sum(others, keepdim=True) * unit) * (g / norm)


def _unit(v: Tensor, dim: int) -> tuple[Tensor, Tensor, list[int]]:
    others = [i for i in range(v.ndim) if i != dim]
    norm: Tensor = linalg.vector_norm(v, dim=others, keepdim=True)
    return v / norm, norm, others
