"""The maps behind Orthogonal, for tall matrices in full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from funcparam.transforms.contract.base import reads_cheaply
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.polar import polar_factor
from funcparam.transforms.numerics.skew_exp import skew_exp


def skew_hermitian(X: Tensor) -> Tensor:
    """A tall X's lower triangle, padded to a square matrix, minus its adjoint."""
    n, k = X.shape[-2:]
    lower = pad(X.tril(), (0, n - k)) if n > k else X.tril()
    return lower - lower.mH


def identity_like(X: Tensor) -> Tensor:
    """The identity of X's shape; ones on the diagonal of a rectangle."""
    return torch.eye(X.shape[-2], X.shape[-1], dtype=X.dtype, device=X.device)


def cayley_plus_identity(A: Tensor) -> Tensor:
    """(I - A/2)^-1 (I + A/2) + I of a skew-Hermitian A: one inverse and no product.

    Where A is so large that to rounding it is all there is, and singular, that is an error. On a
    device, which would have to be waited for, and in a trace it is infinity or NaN.
    """
    inverse, info = linalg.inv_ex(torch.sub(identity_like(A) / 2, A, alpha=0.25))
    if reads_cheaply(info) and bool(torch.func.debug_unwrap(info).any()):
        raise linalg.LinAlgError(
            f"the Cayley transform expects raw well below {1 / torch.finfo(A.dtype).eps:.0e}, where"
            f" I - A / 2 can be inverted in {str(A.dtype).removeprefix('torch.')}; got larger"
            " entries. Lower the learning rate, move the base point with p.rebase before raw grows,"
            " or use Orthogonal('householder'), which goes further"
        )
    return inverse


def _matrix_exp(X: Tensor, base: Tensor | None = None) -> Tensor:
    return _at(base, skew_exp(skew_hermitian(X))[..., : X.shape[-1]])


def _cayley(X: Tensor, base: Tensor | None = None) -> Tensor:
    A = skew_hermitian(X)
    inverse, k = cayley_plus_identity(A), X.shape[-1]
    if base is None:
        return (inverse - identity_like(A))[..., :k]
    return base @ inverse[..., :k] - base[..., :k]


def cayley_turn(X: Tensor) -> Tensor:
    """The Cayley transform of a square X; in float32 orthogonal to rounding for entries up to 1e4.

    The inverse of a large raw is off by its condition. A Newton-Schulz step squares that; it is the
    identity on orthogonal matrices, and so needs no derivative.
    """
    turn = _cayley(X)
    frame = turn.detach()
    return turn + (frame - frame @ (frame.mH @ frame)) / 2


def _householder(X: Tensor, base: Tensor | None = None) -> Tensor:
    """Minus the first columns of the product of the reflections, so that X = 0 gives I.

    The product in the UT form is I - V S^-1 V^T with S = striu(V^T V) + diag(V^T V) / 2: one
    product and one triangular solve instead of a loop. Source: Joffrain et al., Accumulating
    Householder transformations, revisited, ACM TOMS 32 (2006).
    """
    k = X.shape[-1]
    V = X.tril(-1) + identity_like(X)
    gram = V.mT @ V
    S = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    solved: Tensor = linalg.solve_triangular(S, V[..., :k, :].mT, upper=True)
    return _at(base, V @ solved - identity_like(X))


def _qr(X: Tensor, base: Tensor | None = None) -> Tensor:
    """The Q factor of I + X; without a base, that of X."""
    return _at(base, q_factor(_start(X, base)))


def _newton_schulz(X: Tensor, base: Tensor | None = None) -> Tensor:
    """The polar factor of I + X; without a base, that of X."""
    return _at(base, polar_factor(_start(X, base)))


def _start(X: Tensor, base: Tensor | None) -> Tensor:
    # not X - I for X: small weights would round away
    return X if base is None else identity_like(X) + X


def _at(base: Tensor | None, frame: Tensor) -> Tensor:
    return frame if base is None else base @ frame


FRAMES: Mapping[str, Callable[..., Tensor]] = {
    "matrix_exp": _matrix_exp,
    "cayley": _cayley,
    "householder": _householder,
    "qr": _qr,
    "newton_schulz": _newton_schulz,
}
"""Maps from a tall matrix to orthonormal columns, 0 to the identity or to the columns of a base
that is given as the second argument. Without one, "qr" and "newton_schulz" keep a frame X."""


def q_factor(tall: Tensor) -> Tensor:
    """The Q factor of `tall`, with a positive diagonal of R: of an orthonormal frame itself."""
    Q, R = cast("tuple[Tensor, Tensor]", linalg.qr(tall))
    return Q * _phases(R)


def complete_q_factor(tall: Tensor) -> Tensor:
    """An orthogonal matrix whose first columns are the Q factor of `tall`.

    The signs make R's diagonal positive, so the Q factor of an orthonormal frame is itself.
    """
    k = tall.shape[-1]

    Q, R = cast("tuple[Tensor, Tensor]", linalg.qr(tall, mode="complete"))
    return torch.cat([Q[..., :k] * _phases(R), Q[..., k:]], dim=-1)


def _phases(R: Tensor) -> Tensor:
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal == 0, 1, diagonal.sgn()).unsqueeze(-2)


def reflectors(tall: Tensor) -> tuple[Tensor, Tensor]:
    """The Householder vectors and column signs that `_householder` maps to the Q factor."""
    if tall.is_meta:  # geqrf has no meta kernel
        return torch.empty_like(tall), tall.new_empty(tall.shape[:-2] + tall.shape[-1:])
    packed, tau = torch.geqrf(tall)
    diagonal = packed.diagonal(dim1=-2, dim2=-1)
    # _householder negates the product. LAPACK leaves a column that needs no reflection alone
    # (tau = 0), where a reflection by the unit vector negates it.
    signs = torch.where(diagonal < 0, 1, -1) * torch.where(tau == 0, -1, 1)
    return packed.tril(-1), signs.to(tall.dtype)
