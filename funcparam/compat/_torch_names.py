"""Between transforms and the modules and hooks that hold them under torch's names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from funcparam.compat import _private
from funcparam.compat._adapter import TransformModule
from funcparam.compat.parametrizations import OrthogonalModule, WeightNormModule
from funcparam.transforms import AnyTransform, Orthogonal, SpectralNorm, WeightNorm

Direct = tuple[AnyTransform, Any, dict[str, Tensor]]  # a transform with its raw and state

_TORCH_MAPS = ("matrix_exp", "cayley", "householder")


def is_weight_norm(part: nn.Module) -> bool:
    """Whether `parametrizations.weight_norm` made it, torch's or compat's."""
    return isinstance(part, WeightNormModule) or _private.torchs_part(part) == "weight"


def is_spectral_norm(part: nn.Module) -> bool:
    """Whether `parametrizations.spectral_norm` made it, torch's or compat's."""
    ours = isinstance(part, TransformModule) and isinstance(part.transform, SpectralNorm)
    return ours or _private.torchs_part(part) == "spectral"


def from_torch_names(part: nn.Module, raws: tuple[Tensor, ...]) -> Direct | None:
    """The transform in `part` with its raw and state; None if `part` does more than that."""
    kind = _private.torchs_part(part)
    if kind is not None:
        return _from_torchs(kind, cast("Any", part), raws)
    if not isinstance(part, TransformModule):
        return None
    transform, raw = part.transform, part.named(raws)
    if isinstance(part, WeightNormModule):
        return _weight_norm(part.dim, *raws)
    if isinstance(part, OrthogonalModule) and part.householder:
        signs = part.signs(raw)
        if not part.trivialized:
            return transform, raw, {"signs": signs}
        if bool((signs < 0).any()):  # a sign that was turned in raw is beyond the transform
            return None
    return transform, raw, part.state()


def _from_torchs(kind: str, part: Any, raws: tuple[Tensor, ...]) -> Direct | None:
    """What torch's own module computes, where a transform does."""
    if kind == "weight":
        return _weight_norm(part.dim, *raws)
    (X,) = raws
    if kind == "spectral":
        if X.ndim == 1:
            return SpectralNorm(eps=part.eps), X, {}
        transform = SpectralNorm(part.dim, part.n_power_iterations, part.eps)
        return transform, X, {"u": part._u, "v": part._v}
    name, base = part.orthogonal_map.name, getattr(part, "base", None)
    if name == "householder":
        diagonal = X.detach().diagonal(dim1=-2, dim2=-1)
        if bool((diagonal.int().abs() != 1).any()):  # torch multiplies by it, cut to integers
            return None
    ours = OrthogonalModule(Orthogonal(name, hasattr(part, "base")), X.shape)
    ours.base = base
    return None if ours.trivialized and base is None else from_torch_names(ours, raws)


def from_hook(hook: WeightNormHook | SpectralNormHook, module: nn.Module) -> Direct:
    """The transform that an older hook computes a weight of `module` by, with raw and state.

    Raises:
        TypeError: no transform computes it.
    """
    if isinstance(hook, WeightNormHook):
        return _weight_norm(hook.dim, *_beside(module, hook.name, "gv"))
    (X,), (u, v) = (_beside(module, hook.name, suffixes) for suffixes in (["orig"], "uv"))
    if X.ndim == 1:
        raise TypeError(
            f"{hook.name!r}: the hook of spectral_norm computes a vector by power iteration, which"
            " no transform does; remove it (remove_spectral_norm) and use SpectralNorm()"
        )
    return SpectralNorm(hook.dim, hook.n_power_iterations, hook.eps), X, {"u": u, "v": v}


def _beside(module: nn.Module, name: str, suffixes: Iterable[str]) -> list[Tensor]:
    return [getattr(module, f"{name}_{suffix}") for suffix in suffixes]


def _weight_norm(dim: int, magnitude: Tensor, direction: Tensor) -> Direct:
    """In torch -1 means the whole tensor, whose magnitude then has no dimension."""
    if magnitude.ndim == 0:
        magnitude = magnitude.reshape((1,) * direction.ndim)
    transform = WeightNorm(None if dim == -1 else dim)
    return transform, {"magnitude": magnitude, "direction": direction}, {}


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
