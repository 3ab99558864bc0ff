"""Orthonormal frames that move from a base point, and matrices between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from funcparam.transforms.contract.base import State
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.orthogonal_maps import (
    cayley_plus_identity,
    identity_like,
    q_factor,
)
from funcparam.transforms.numerics.polar import nearest_orthogonal

Factors = Mapping[str, Tensor]


def tilted(base: Tensor, X: Tensor) -> Tensor:
    """The frame `base` tilted in the direction of X's part K that is orthogonal to it.

    It is the first columns of the Cayley transform of [[0, -K^H], [K, 0]] in the basis of `base`
    and its complement. That is the reflection of `base` in the span of `base + K / 2`, whose
    singular values are at least 1: Q is orthonormal to rounding, and has bounded derivatives, at
    any X, and nothing as large as the complement is needed.
    """
    K = X - base @ (base.mH @ X)
    Q, _ = cast("tuple[Tensor, Tensor]", linalg.qr(base + K / 2))
    return 2 * Q @ (Q.mH @ base) - base


def turned(base: Tensor, A: Tensor) -> Tensor:
    """The frame `base` turned in its own span by the Cayley transform of a skew-Hermitian A.

    Large entries leave the transform orthogonal to some digits only; one Newton-Schulz step
    doubles them. It is the identity on orthogonal matrices, and so needs no derivative.
    """
    turn = cayley_plus_identity(A) - identity_like(A)
    fixed = turn.detach()
    return base @ (turn + (fixed - fixed @ (fixed.mH @ fixed)) / 2)


def moved(base: Tensor, X: Tensor) -> Tensor:
    """The frame `base` tilted, and turned by the skew part of base^H X.

    To first order it is `base` plus the projection of X on the tangent space there.
    """
    along = base.mH @ X
    frame = tilted(base, X) if base.shape[-2] > base.shape[-1] else base
    return turned(frame, (along - along.mH) / 2)


def svd(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition."""
    return linalg.svd(value, full_matrices=False)


def between_frames(raw: Factors, spectrum: Tensor, state: State) -> Tensor:
    """U diag(spectrum) V^H of the frames U and V that raw moves from their bases."""
    U, V = moved(state["base_U"], raw["U"]), moved(state["base_V"], raw["V"])
    return (U * spectrum.unsqueeze(-2)) @ V.mH


def at_frames(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Factors, State]:
    """Raw and state with these frames as their bases, and this raw S."""
    # LAPACK's columns are apart and lazily conjugate; optimizers flatten raw
    left, right = (frame.resolve_conj().contiguous() for frame in (U, Vh.mH))
    raw = {"U": torch.zeros_like(left), "S": S, "V": torch.zeros_like(right)}
    return raw, {"base_U": left, "base_V": right}


def with_exact_bases(state: State) -> State:
    """State with the nearest orthonormal frames as bases."""
    bases = {key: nearest_orthogonal(state[key]) for key in ("base_U", "base_V")}
    return {**state, **bases}


def with_moved_bases(raw: Factors, state: State) -> tuple[Factors, State]:
    """Both frames as their own bases; `q_factor` takes the rounding of many moves off."""
    U, V = (q_factor(moved(state[f"base_{name}"], raw[name])) for name in ("U", "V"))
    zeros = {name: torch.zeros_like(raw[name]) for name in ("U", "V")}
    return {**raw, **zeros}, {**state, "base_U": U, "base_V": V}
