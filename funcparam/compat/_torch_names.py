"""Between transforms and the modules and hooks that hold them under torch's names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from funcparam.compat import _private
from funcparam.compat._adapter import TransformModule
from funcparam.compat._private import ORTHOGONAL_MAPS
from funcparam.compat.parametrizations import (
    OrthogonalModule,
    SpectralNormModule,
    WeightNormModule,
    signs_of,
)
from funcparam.transforms import AnyTransform, Orthogonal, SpectralNorm, WeightNorm

Direct = tuple[AnyTransform, Any, dict[str, Tensor]]  # a transform with its raw and state

# Of a subclass nothing is known: it may compute anything.
_ORTHOGONALS = OrthogonalModule, _private.TorchOrthogonal
_SPECTRAL_NORMS = SpectralNormModule, _private.TorchSpectralNorm
_WEIGHT_NORMS = WeightNormModule, _private.TorchWeightNorm


def is_weight_norm(part: nn.Module) -> bool:
    """Whether `parametrizations.weight_norm` made it, torch's or compat's."""
    return type(part) in _WEIGHT_NORMS


def is_spectral_norm(part: nn.Module) -> bool:
    """Whether `parametrizations.spectral_norm` made it, torch's or compat's, or a transform."""
    ours = isinstance(part, TransformModule) and isinstance(part.transform, SpectralNorm)
    return ours or type(part) in _SPECTRAL_NORMS


def from_torch_names(part: Any, raws: tuple[Tensor, ...]) -> Direct | None:
    """The transform in `part` with its raw and state; None if `part` does more than that."""
    if type(part) is TransformModule:
        return part.transform, part.named(raws), part.state()
    if type(part) in _WEIGHT_NORMS:
        return _weight_norm(part.dim, *raws)
    if type(part) in _ORTHOGONALS:
        return _orthogonal(part, raws[0])
    if type(part) not in _SPECTRAL_NORMS:
        return None
    if raws[0].ndim == 1:
        return SpectralNorm(eps=part.eps), raws[0], {}
    transform = SpectralNorm(part.dim, part.n_power_iterations, part.eps)
    return transform, raws[0], {"u": part._u, "v": part._v}


def _orthogonal(part: Any, X: Tensor) -> Direct | None:
    name, based = part.orthogonal_map.name, hasattr(part, "base")
    if based and part.base is None:
        return None
    transform, state = Orthogonal(name, based), {"base": part.base} if based else {}
    if name == "householder":
        diagonal = X.detach().diagonal(dim1=-2, dim2=-1)
        torchs = type(part) is not OrthogonalModule
        if torchs and bool((diagonal.int().abs() != 1).any()):
            return None  # torch multiplies by it, cut to integers
        signs = signs_of(X)
        if not based:
            state = {"signs": signs}
        elif bool((signs < 0).any()):
            return None  # a sign that was turned in raw is beyond the transform
    return transform, X, state


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
    if isinstance(transform, Orthogonal) and transform.map in ORTHOGONAL_MAPS.__members__:
        return _to_orthogonal(transform, raw, state)
    if isinstance(transform, SpectralNorm) and state:
        # on the meta device nothing is drawn
        iterations = transform.n_power_iterations or 1
        part = SpectralNormModule(raw.to("meta"), iterations, transform.dim, transform.eps)
        for key, vector in state.items():
            part.register_buffer(f"_{key}", vector)
        return part, (raw,)
    part = TransformModule(transform)
    part.take(raw, state)
    return part, (raw,) if isinstance(raw, Tensor) else tuple(raw.values())


def _to_orthogonal(
    transform: Orthogonal, raw: Tensor, state: dict[str, Tensor]
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    known = ORTHOGONAL_MAPS[transform.map]
    part = OrthogonalModule(raw, known, use_trivialization=transform.trivialize)
    if transform.trivialize:
        part.base = state["base"]
    if "signs" in state:
        raw = _with_signs(raw, state["signs"])
    return part, (raw,)


def _with_signs(raw: Tensor, signs: Tensor) -> Tensor:
    """`raw` with a diagonal that stands for `signs`, where it does not already."""
    kept = raw.diagonal(dim1=-2, dim2=-1)
    right = torch.where(signs_of(raw) == signs, kept, -signs)
    raw.diagonal(dim1=-2, dim2=-1).copy_(right)
    return raw
