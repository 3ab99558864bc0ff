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


def lifted(base: Tensor, X: Tensor, covector: Tensor) -> Tensor | None:
    """The tangent `G` at `moved(base, X)` of which the gradient by X is `covector`.

    Of a covector it is the part that such gradients can be; None where `lifted_by_tilt` is. The
    gradient by the skew part of `base^H X` is that of a Cayley transform, which products undo.
    """
    along, part = base.mH @ X, base.mH @ covector
    A, turn = (along - along.mH) / 2, (part - part.mH) / 2
    minus, plus = identity_like(A) - A / 2, identity_like(A) + A / 2
    turned, turn = linalg.solve(minus, plus), plus @ turn @ minus
    if base.shape[-2] == base.shape[-1]:
        return base @ turn @ turned
    G = lifted_by_tilt(base, X, covector, turn)
    return None if G is None else G @ turned


def lifted_by_tilt(base: Tensor, X: Tensor, covector: Tensor, turn: Tensor) -> Tensor | None:
    """The `G` of which the gradient by X is `covector`, with `T^H G = turn` for `T = tilted(...)`.

    With `M = I + K^H K / 4` it is `T = (2 base + K) M^-1 - base`, and the gradient by K is
    `G M^-1 - K H / 2` orthogonally to the base, with the Hermitian part H of
    `(T + base)^H G M^-1`. In the basis where M is diagonal that and `T^H G = turn` are three
    equations for the entries (i, j) and (j, i) of `base^H G` and for that of H. None where K is
    large, where a frame turns by a quarter they may have no solution.
    """
    K = X - base @ (base.mH @ X)
    rest = covector - base @ (base.mH @ covector)
    gram = K.mH @ K / 4
    if not bool(gram.isfinite().all()):
        return None
    squares, V = linalg.eigh(gram)
    if not bool((squares < 0.5).all()):
        return None
    own, H = _from_gradients(squares, V.mH @ turn @ V, V.mH @ (K.mH @ rest) @ V)
    own, H = V @ own @ V.mH, V @ H @ V.mH
    return base @ own + (rest + K @ H / 2) @ (identity_like(gram) + gram)


def _from_gradients(squares: Tensor, turn: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor]:
    """`base^H G` and `H` of `lifted_by_tilt`, by Cramer's rule for entries (i, j) and (j, i)."""
    e, f = squares.unsqueeze(-1), squares.unsqueeze(-2)
    first = (1 + e) * turn - (1 + f) * tilt  # = (1 - e) own + 2 e (1 + f) H
    other = -(1 + f) * turn - (1 + e) * tilt.mH  # the same of the entry (j, i), conjugate
    sums = (e - f) * turn  # = 2 (1 + e) (1 + f) H - (1 + e) own - (1 + f) own^H
    H = (1 - e) * (1 - f) * sums + (1 - f) * (1 + e) * first + (1 - e) * (1 + f) * other
    H = H / (2 * (1 + e) * (1 + f) * (1 - e * f))
    return (first - 2 * e * (1 + f) * H) / (1 - e), H


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
