"""Between transforms and the modules that hold them under torch's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from funcparam.compat._adapter import TransformModule
from funcparam.compat.parametrizations import OrthogonalModule, WeightNormModule
from funcparam.transforms import AnyTransform, Orthogonal, SpectralNorm, WeightNorm

_TORCH_MAPS = ("matrix_exp", "cayley", "householder")


def from_torch_names(
    part: TransformModule, raws: tuple[Tensor, ...]
) -> tuple[AnyTransform, Any, dict[str, Tensor]] | None:
    """The transform in `part` with its raw and state; None if `part` does more than that."""
    transform, raw = part.transform, part.named(raws)
    if isinstance(part, WeightNormModule):
        magnitude, direction = raws
        if magnitude.ndim == 0:
            magnitude = magnitude.reshape((1,) * direction.ndim)
        return transform, {"magnitude": magnitude, "direction": direction}, {}
    if isinstance(part, OrthogonalModule) and part.householder:
        signs = part.signs(raw)
        if not part.trivialized:
            return transform, raw, {"signs": signs}
        if bool((signs < 0).any()):  # a sign that was turned in raw is beyond the transform
            return None
    return transform, raw, part.state()


def with_torch_names(
    transform: AnyTransform, raw: Any, state: dict[str, Tensor]
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module for a transform and its raw tensors, spelt as in torch where torch has it."""
    if isinstance(transform, WeightNorm):
        magnitude = raw["magnitude"]
        whole = transform.dim is None
        raws = magnitude.reshape(()) if whole else magnitude, raw["direction"]
        return WeightNormModule(transform.dim), raws
    if isinstance(transform, Orthogonal) and transform.map in _TORCH_MAPS:
        part = OrthogonalModule(transform, raw.shape)
        if "signs" in state:
            return part, (_with_signs(part, raw, state["signs"]),)
    elif isinstance(transform, SpectralNorm) and state:
        part = TransformModule(transform, {"u": "_u", "v": "_v"})
    else:
        part = TransformModule(transform)
    part.take(raw, state)
    return part, (raw,) if isinstance(raw, Tensor) else tuple(raw.values())


def _with_signs(part: OrthogonalModule, raw: Tensor, signs: Tensor) -> Tensor:
    """`raw` with a diagonal that stands for `signs`, where it does not already."""
    kept = raw.diagonal(dim1=-2, dim2=-1)
    right = torch.where(part.signs(raw) == signs, kept, -signs)
    raw.diagonal(dim1=-2, dim2=-1).copy_(right)
    return raw
