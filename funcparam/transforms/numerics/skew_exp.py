"""The exponential of skew-Hermitian matrices."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from funcparam.transforms.contract.base import has_entries
from funcparam.transforms.numerics.linalg import linalg

_R = sqrt(177)
_X3 = 2 / 3
_X1, _X2 = _X3 * (1 + _R) / 88, _X3 * (1 + _R) / 352
_X4 = (-271 + 29 * _R) / (315 * _X3)
_X5, _X6 = 11 * (_R - 1) / (1260 * _X3), 11 * (_R - 9) / (5040 * _X3)
_X7 = (89 - _R) / (5040 * _X3**2)
_Y2 = (857 - 58 * _R) / 630

# Squarings after which what they have doubled is still small enough for its square to vanish.
_CORRECTED_EVERY = 8


def skew_exp(A: Tensor) -> Tensor:
    """exp(A), orthogonal to rounding, by a Taylor polynomial and squarings.

    In float32 up to entries of 1e7. Where no norm can be read (compiled, exported), PyTorch's
    `matrix_exp` takes the squarings at once, and that holds up to entries of about 1e3.

    The polynomial has degree 8 and takes three products. Source: Bader, Blanes and Casas,
    Computing the matrix exponential with an optimized Taylor polynomial approximation,
    Mathematics 7 (2019), 1174, equation 13.
    """
    if not (A.numel() and has_entries(A)):  # a trace must not depend on data
        return _nearest_orthogonal(linalg.matrix_exp(A))
    A2 = A @ A
    doublings = _doublings(A2.detach())
    whole = torch.func.debug_unwrap(doublings)
    least, most = int(whole.amin()), int(whole.amax())
    alike = most - least < 2  # one halving too many loses a bit, and less than telling apart costs
    if alike:
        power = _taylor(A, A2, 2.0**-most)
    else:
        scale = torch.exp2(-doublings)
        power = _taylor(A * scale, A2 * scale.square(), 1.0)
    for i in range(most):
        square = power @ power
        power = square if alike or i < least else torch.where(i < doublings, square, power)
        if i % _CORRECTED_EVERY == _CORRECTED_EVERY - 1:
            power = _nearest_orthogonal(power)
    return _nearest_orthogonal(power) if most else power


def _taylor(A: Tensor, A2: Tensor, t: float) -> Tensor:
    """exp(t A), given A and its square: scaling by a number costs nothing in the coefficients."""
    A4 = A2 @ torch.add(A * (_X1 * t**3), A2, alpha=_X2 * t**4)
    left = torch.add(A4, A2, alpha=_X3 * t**2)
    right = torch.add(torch.add(A * (_X5 * t), A2, alpha=_X6 * t**2), A4, alpha=_X7)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    low = torch.add(torch.add(identity, A, alpha=t), A2, alpha=_Y2 * t**2)
    return torch.add(low, left, alpha=_X4) + left @ right


def _doublings(A2: Tensor) -> Tensor:
    """How often A is to be halved for the polynomial to be exact to rounding, as (..., 1, 1).

    A^2 is Hermitian, so its largest row sum bounds its eigenvalues, more tightly than a norm of A
    bounds those of A. NaN and infinity need no squaring to show.
    """
    bound = 0.58 if A2.dtype in (torch.float32, torch.complex64) else 0.05
    rows: Tensor = linalg.vector_norm(A2, 1, dim=-1, keepdim=True)
    halvings = (rows.amax(-2, keepdim=True) / bound**2).log2() / 2
    return torch.nan_to_num(halvings.ceil().clamp_min(0), posinf=0)


def _nearest_orthogonal(Q: Tensor) -> Tensor:
    """Squaring doubles the rounding error; one Newton-Schulz step squares it.

    It is the identity on orthogonal matrices, and so needs no derivative.
    """
    frame = Q.detach()
    return Q + (frame - frame @ (frame.mH @ frame)) / 2
