from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from funcparam.transforms._base import State, Transform, expect_matrix, largest
from funcparam.transforms._linalg import linalg
from funcparam.transforms._precision import full_precision


@final
@dataclass(frozen=True)
class Orthogonal(Transform[Tensor]):
    r"""Matrices with orthonormal columns (tall and square) or rows (wide).

    $$W = B \, f(X), \qquad f(0) = I$$

    Raw has the shape of the value, `(..., m, n)`. Of a tall raw `X` the lower triangle counts; a
    wide one is transposed first, and the result back. With `A = tril(X) - tril(X)^H`, padded to
    a square matrix,

    * `"matrix_exp"`: `f(X)` is the first columns of `exp(A)`;
    * `"cayley"`: the first columns of `(I - A/2)^-1 (I + A/2)`; no eigenvalue -1 is reached;
    * `"householder"`: the first columns of a product of reflections, one for each column of
      `tril(X, -1) + I`. Real dtypes.

    With `trivialize` (the default) state `{"base"}` holds an orthogonal matrix `B` of the longer
    side: init writes the value there and starts raw at 0, so every orthogonal value is kept, and
    any other becomes its Q factor. `rebase` moves it. Without it there is no base:
    `"householder"` keeps the value by its reflectors and has state `{"signs"}`; the other two
    maps cannot be inverted.

    The columns are orthonormal to rounding for every raw, weight decay and long training
    included: nothing but `B` and `X` is ever rounded to the constraint.

    Args:
        map: `"matrix_exp"`, `"cayley"` or `"householder"`.
        trivialize: whether to multiply by a base point.

    Raises:
        ValueError: `map` is none of the three; at `fp.parametrize`, if the value has fewer than
            two dimensions, or is complex with `"householder"`.
        NotImplementedError: at init, with `"matrix_exp"` or `"cayley"` and no base point.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Orthogonal
        >>> raw, state = Orthogonal().right_inverse(torch.eye(3, 2))
        >>> W = Orthogonal().forward(raw + torch.ones(3, 2), state)
        >>> torch.allclose(W.mT @ W, torch.eye(2), atol=1e-6)
        True

    Source: Lezcano-Casado and Martínez-Rubio, arXiv 1901.08428; Lezcano-Casado, Trivializations,
    arXiv 1909.09501 (base points); Helfrich et al., arXiv 1707.09520 (Cayley); Mhammedi et al.,
    arXiv 1612.00188 (Householder).
    """

    map: Literal["matrix_exp", "cayley", "householder"] = "matrix_exp"
    trivialize: bool = True

    def __post_init__(self) -> None:
        if self.map not in _FRAMES:
            raise ValueError(
                f"Orthogonal expects map to be one of {', '.join(map(repr, _FRAMES))};"
                f" got {self.map!r}"
            )

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        wide = raw.shape[-2] < raw.shape[-1]
        frame = _FRAMES[self.map](raw.mT if wide else raw)
        if self.trivialize:
            frame = state["base"] @ frame
        elif self.map == "householder":
            frame = frame * state["signs"].unsqueeze(-2)
        return frame.mT if wide else frame

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        wide = value.shape[-2] < value.shape[-1]
        tall = value.mT if wide else value
        if self.trivialize:
            return torch.zeros_like(value), {"base": _complete_q_factor(tall)}
        if self.map != "householder":
            raise NotImplementedError(
                f"{self!r} has no right inverse: use trivialize=True, which keeps a base point,"
                " or map='householder'"
            )
        raw, signs = _reflectors(tall)
        return raw.mT if wide else raw, {"signs": signs}

    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.trivialize:
            return raw, state
        return self.right_inverse(self.forward(raw, state))

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W^H W - I| of the shorter side."""
        tall = value.mT if value.shape[-2] < value.shape[-1] else value
        gram = tall.mH @ tall
        return largest(gram - _identity(gram))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: orthogonal matrices are a manifold, on which"
            " only a volume element exists"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        if value.is_complex() and self.map == "householder":
            raise ValueError(
                f"{self!r} expects a real tensor; got {value.dtype}. Use map='matrix_exp' or"
                " 'cayley'"
            )


def _skew_hermitian(X: Tensor) -> Tensor:
    """A tall X's lower triangle, padded to a square matrix, minus its adjoint."""
    n, k = X.shape[-2:]
    lower = pad(X.tril(), (0, n - k)) if n > k else X.tril()
    return lower - lower.mH


def _identity(X: Tensor) -> Tensor:
    return torch.eye(X.shape[-2], X.shape[-1], dtype=X.dtype, device=X.device)


def _matrix_exp(X: Tensor) -> Tensor:
    exponential: Tensor = linalg.matrix_exp(_skew_hermitian(X))
    Q = exponential[..., : X.shape[-1]]
    # Squaring doubles the rounding error of a large A. One Newton-Schulz step squares it instead;
    # it is the identity on orthogonal matrices, and so needs no derivative.
    frame = Q.detach()
    return Q + (frame - frame @ (frame.mH @ frame)) / 2


def _cayley(X: Tensor) -> Tensor:
    A = _skew_hermitian(X)
    # (I - A/2)^-1 (I + A/2) = 2 (I - A/2)^-1 - I: one inverse and no product
    identity = _identity(A)
    inverse: Tensor = linalg.inv(identity - A / 2)
    return (2 * inverse - identity)[..., : X.shape[-1]]


def _householder(X: Tensor) -> Tensor:
    """Minus the first columns of the product of the reflections, so that X = 0 gives I.

    The product in the UT form is I - V S^-1 V^T with S = striu(V^T V) + diag(V^T V) / 2: one
    product and one triangular solve instead of a loop. Source: Joffrain et al., Accumulating
    Householder transformations, revisited, ACM TOMS 32 (2006).
    """
    k = X.shape[-1]
    V = X.tril(-1) + _identity(X)
    gram = V.mT @ V
    S = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    solved: Tensor = linalg.solve_triangular(S, V[..., :k, :].mT, upper=True)
    return V @ solved - _identity(X)


_FRAMES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"matrix_exp": _matrix_exp, "cayley": _cayley, "householder": _householder}
)


def _complete_q_factor(tall: Tensor) -> Tensor:
    """An orthogonal matrix whose first columns are the Q factor of `tall`.

    The signs make R's diagonal positive, so the Q factor of an orthonormal frame is itself.
    """
    k = tall.shape[-1]

    Q, R = cast("tuple[Tensor, Tensor]", linalg.qr(tall, mode="complete"))
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    phases = torch.where(diagonal == 0, 1, diagonal.sgn()).unsqueeze(-2)
    return torch.cat([Q[..., :k] * phases, Q[..., k:]], dim=-1)


def _reflectors(tall: Tensor) -> tuple[Tensor, Tensor]:
    """The Householder vectors and column signs that `_householder` maps to the Q factor."""
    if tall.is_meta:  # geqrf has no meta kernel
        return torch.empty_like(tall), tall.new_empty(tall.shape[:-2] + tall.shape[-1:])
    packed, tau = torch.geqrf(tall)
    diagonal = packed.diagonal(dim1=-2, dim2=-1)
    # _householder negates the product. LAPACK leaves a column that needs no reflection alone
    # (tau = 0), where a reflection by the unit vector negates it.
    signs = torch.where(diagonal < 0, 1, -1) * torch.where(tau == 0, -1, 1)
    return packed.tril(-1), signs.to(tall.dtype)
