"""The orthogonal polar factor by products alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from funcparam.transforms.contract.base import largest, readable, reads_cheaply
from funcparam.transforms.numerics.linalg import linalg

# Each takes the singular values of an interval as near to 1 as an odd polynomial of degree five
# can; the first has those of [1e-5, 1], the next what the one before leaves, and a thousandth more
# for rounding. Where the interval begins below a fifth of its end it is the fifth that counts: the
# best polynomial would take large values to small ones as well, and lose their vectors to rounding.
# It would spare three steps. tests/transforms/test_polar.py derives them.
_STEPS = (
    (6.9429277998686665, -14.227217768411716, 9.27354142532827),
    (3.4720076699864317, -1.7794692412666875, 0.2900368112274949),
    (3.4712712664172716, -1.7793972155056517, 0.2900748567581205),
    (3.4687176530219195, -1.7791480636734842, 0.2902071182588421),
    (3.459891628884621, -1.7782942821901797, 0.29066824927024043),
    (3.4297319189228377, -1.7754654062943314, 0.29229210234100594),
    (3.3306305940801133, -1.7672339721176278, 0.2982046853010928),
    (3.0453309796417485, -1.7562447799848238, 0.32209828982267324),
    (2.508198225754625, -1.8473931824348717, 0.4372446013404176),
    (1.9214942658557572, -1.3003643652571837, 0.3797607461072377),
)
# Far above rounding, and far below where the steps leave what they do not bring to 1.
CONVERGED = 1e-4

# Newton and Schulz's steps leave what was off by 0.11 off by 5e-3, that by 4e-7, and that by 2e-16;
# of squares that is twice as much.
_RATHER_NEAR, _NEAR = 0.2, 1e-2
_NEWTON_SCHULZ = (15 / 8, -10 / 8, 3 / 8)


def polar_factor(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns to a tall X, `U V^H` of `X = U S V^H`.

    Twelve steps `Y <- a Y + b Y Y^H Y + c Y (Y^H Y)^2`. Ten bring singular values from 1e-5 of
    their bound on near to 1, the other two are Newton and Schulz's. No factorisation, and nothing
    that depends on data.

    Source: Amsel, Persson, Musco and Gower, The Polar Express, arXiv 2505.16932, theorem 3.1 and
    section 4.4; Björck and Bowie, SIAM J. Numer. Anal. 8 (1971) (Newton-Schulz).
    """
    if X.numel() == 0:  # has no norm
        return X
    # The factor does not see the scale, so a constant one is exact in every derivative.
    size = X.detach().abs().amax((-2, -1), keepdim=True)
    scaled = X / torch.where(size > 0, size, 1)
    gram = scaled.mH @ scaled
    # the largest row sum is at least the square of the spectral norm, by a root of the side at most
    bound = gram.detach().abs().sum(-1, keepdim=True).amax(-2, keepdim=True)
    bound = torch.where(bound > 0, bound, 1)
    frame, gram = scaled * bound.rsqrt(), gram / bound
    for i, (a, b, c) in enumerate(_STEPS):
        gram = frame.mH @ frame if i else gram
        frame = torch.add(frame @ torch.add(gram * b, gram @ gram, alpha=c), frame, alpha=a)
    return _refined(_refined(frame))


def nearest_orthogonal(W: Tensor) -> Tensor:
    """The polar factor of a tall or wide matrix: the nearest with orthonormal columns, or rows.

    What is read without waiting for a device decides how. Near to such a matrix, as a step from one
    leads, Newton and Schulz's steps alone do it. Products do not bring singular values of 0 to 1:
    there a decomposition does, to one of the matrices that are equally near.
    """
    if W.shape[-2] < W.shape[-1]:
        return nearest_orthogonal(W.mH).mH
    reads = readable(W) and reads_cheaply(W)
    off = _off(W.detach()).item() if reads else torch.inf
    if off < _NEAR:
        return _refined(_refined(W))
    if off < _RATHER_NEAR:
        return _refined(_refined(_refined(W)))
    frame = polar_factor(W)
    if reads and not bool(_off(frame.detach()) < CONVERGED) and bool(W.isfinite().all()):
        U, _, Vh = cast("tuple[Tensor, Tensor, Tensor]", linalg.svd(W, full_matrices=False))
        return U @ Vh
    return frame


def _refined(frame: Tensor) -> Tensor:
    a, b, c = _NEWTON_SCHULZ
    gram = frame.mH @ frame
    return torch.add(frame @ torch.add(gram * b, gram @ gram, alpha=c), frame, alpha=a)


def _off(frame: Tensor) -> Tensor:
    """The largest row sum of `|F^H F - I|`, which no eigenvalue of the difference exceeds."""
    gram = frame.mH @ frame
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return largest((gram - eye).abs().sum(-1))


def orthogonal_tangent(W: Tensor, G: Tensor) -> Tensor:
    """The part of G in the directions in which a W with orthonormal columns, or rows, can move.

    `G - W sym(W^H G)`. Source: Edelman, Arias and Smith, SIAM J. Matrix Anal. 20 (1998), eq. 2.4.
    """
    if W.shape[-2] < W.shape[-1]:
        return orthogonal_tangent(W.mH, G.mH).mH
    along = W.mH @ G
    return G - W @ (along + along.mH) / 2
