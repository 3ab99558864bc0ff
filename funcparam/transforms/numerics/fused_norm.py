"""Weight norm by PyTorch's own kernels, with second derivatives that are right."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from funcparam.transforms.numerics.linalg import linalg

_weight_norm: Any = getattr(torch, "_weight_norm", None)
_transforms_active: Any = getattr(
    torch._C,  # pyright: ignore[reportPrivateUsage]
    "_are_functorch_transforms_active",
    lambda: True,
)


def can_fuse(magnitude: Tensor, direction: Tensor) -> bool:
    """Whether the kernels take these tensors.

    They have no rules for `torch.func` transforms and forward mode, and a compiler fuses by itself.
    """
    return (
        not torch.compiler.is_compiling()
        and not _transforms_active()
        and direction.dtype in (torch.float32, torch.float64)
        and magnitude.dtype == direction.dtype
        and type(direction) in (nn.Parameter, Tensor)
        and type(magnitude) in (nn.Parameter, Tensor)
        and direction.is_contiguous()
        and not direction.is_meta
        and direction.numel() > 0
        and getattr(forward_ad, "_current_level", 0) < 0
        and _weight_norm is not None
    )


def fused_weight_norm(magnitude: Tensor, direction: Tensor, dim: int) -> Tensor:
    """WeightNorm's value, with the norm over all dimensions but `dim`, the first or last one."""
    value: Tensor = _weight_norm(direction, magnitude, dim)
    node = value.grad_fn
    if node is not None:
        node.register_hook(partial(_gradients, magnitude, direction, dim))
    return value


def _gradients(g: Tensor, v: Tensor, dim: int, found: Any, grads: Any) -> Any:
    """What the backward pass returns; in one that is differentiated, composed anew.

    PyTorch's own takes the norm for a constant there.
    """
    if not torch.is_grad_enabled():
        return None
    (G,) = (grad for grad in grads if grad is not None)
    others = [i for i in range(v.ndim) if i != dim]
    norm: Tensor = linalg.vector_norm(v, dim=others, keepdim=True)
    unit = v / norm
    grad_g = (G * unit).sum(others, keepdim=True)
    grad_v = (G - grad_g * unit) * (g / norm)
    return tuple(
        None if old is None else new for old, new in zip(found, (grad_v, grad_g), strict=True)
    )
