"""The exponential of skew-Hermitian matrices."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from funcparam.transforms._linalg import linalg

_R = sqrt(177)
_X3 = 2 / 3
_X1, _X2 = _X3 * (1 + _R) / 88, _X3 * (1 + _R) / 352
_X4 = (-271 + 29 * _R) / (315 * _X3)
_X5, _X6 = 11 * (_R - 1) / (1260 * _X3), 11 * (_R - 9) / (5040 * _X3)
_X7 = (89 - _R) / (5040 * _X3**2)
_Y2 = (857 - 58 * _R) / 630


def skew_exp(A: Tensor) -> Tensor:
    """exp(A), orthogonal to rounding at any norm, by a Taylor polynomial and squarings.

    The polynomial has degree 8 and takes three products. Source: Bader, Blanes and Casas,
    Computing the matrix exponential with an optimized Taylor polynomial approximation,
    Mathematics 7 (2019), 1174, equation 13.
    """
    if not _has_readable_norm(A):  # a trace must not depend on data
        return _nearest_orthogonal(linalg.matrix_exp(A))
    doublings = _doublings(A.detach())
    whole = torch.func.debug_unwrap(doublings)
    most = int(whole.amax())
    if most == 0:
        return _taylor(A)
    power = _taylor(A * torch.exp2(-doublings))
    for i in range(most):
        square = power @ power
        power = square if whole.ndim == 2 else torch.where(i < doublings, square, power)
    return _nearest_orthogonal(power)


def _taylor(A: Tensor) -> Tensor:
    A2 = A @ A
    A4 = A2 @ torch.add(A * _X1, A2, alpha=_X2)
    left = torch.add(A4, A2, alpha=_X3)
    right = torch.add(torch.add(A * _X5, A2, alpha=_X6), A4, alpha=_X7)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    low = torch.add(torch.add(identity + A, A2, alpha=_Y2), left, alpha=_X4)
    return low + left @ right


def _doublings(A: Tensor) -> Tensor:
    """How often A is to be halved for the polynomial to be exact to rounding, as (..., 1, 1).

    Eigenvalues of a real A come in pairs of equal size, so its Frobenius norm is at least sqrt(2)
    times its spectral norm. NaN and infinity need no squaring to show.
    """
    bound = 0.58 if A.dtype in (torch.float32, torch.complex64) else 0.05
    norm: Tensor = linalg.vector_norm(A, dim=(-2, -1), keepdim=True)
    ratio = norm / (bound if A.is_complex() else bound * sqrt(2))
    return torch.nan_to_num(ratio.log2().ceil().clamp_min(0), posinf=0)


def _nearest_orthogonal(Q: Tensor) -> Tensor:
    """Squaring doubles the rounding error; one Newton-Schulz step squares it.

    It is the identity on orthogonal matrices, and so needs no derivative.
    """
    frame = Q.detach()
    return Q + (frame - frame @ (frame.mH @ frame)) / 2


def _has_readable_norm(A: Tensor) -> bool:
    """Whether numbers can decide, in `torch.func` transforms too: no trace, no meta tensor."""
    if torch.compiler.is_compiling() or A.is_meta or A.numel() == 0:
        return False
    return type(torch.func.debug_unwrap(A)) in (Tensor, nn.Parameter)
