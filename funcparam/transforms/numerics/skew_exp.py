"""The exponential of skew-Hermitian matrices."""

from __future__ import annotations

from math import ceil, inf, log2, sqrt

import torch
from torch import Tensor

from funcparam.transforms.contract.base import reads_cheaply
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

    All is done with E = exp(A / 2^k) - I, of which no squaring loses a bit: it is 2 E + E^2. So
    any number of them is enough that makes the polynomial exact. On a CPU the norm is read, and
    asks for as many as it takes, in float32 up to entries of 1e7. A device would have to be waited
    for, and a trace has nothing to read: there it is always 16, or 20 in float64, which is enough
    up to a spectral norm of about 1e4; beyond that the result is NaN.

    The polynomial has degree 8 and takes three products. Source: Bader, Blanes and Casas,
    Computing the matrix exponential with an optimized Taylor polynomial approximation,
    Mathematics 7 (2019), 1174, equation 13.
    """
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    if A.numel() == 0:
        return A + identity
    A2 = A @ A
    size = _size(A2.detach())
    if reads_cheaply(A):
        most = float(torch.func.debug_unwrap(size).amax())
        squarings = ceil(log2(most) / 2) if 1 < most < inf else 0  # NaN shows without any
    else:
        squarings = 16 if _is_single(A) else 20
        identity = torch.where(size > 4.0**squarings, torch.nan, identity)
    power, twice = _taylor(A, A2, 2.0**-squarings), 2 * identity
    for i in range(squarings):
        if i and i % _CORRECTED_EVERY == 0:
            power = _corrected(power)
        power = power @ (power + twice)
    Q = power + identity
    return _nearest_orthogonal(Q) if squarings else Q


def _taylor(A: Tensor, A2: Tensor, t: float) -> Tensor:
    """exp(t A) - I, given A and its square: scaling by a number costs nothing in the coefficients.

    Equation 13 less its identity, by the distributive law.
    """
    A4 = A2 @ torch.add(A * (_X1 * t**3), A2, alpha=_X2 * t**4)
    left = torch.add(A4, A2, alpha=_X3 * t**2)
    right = torch.add(torch.add(A * (_X5 * t), A2, alpha=_X6 * t**2), A4, alpha=_X7)
    low = torch.add(A * t, A2, alpha=_Y2 * t**2)
    return torch.add(low, left, alpha=_X4) + left @ right


def _size(A2: Tensor) -> Tensor:
    """A bound of A^2, as (..., 1, 1), in units of what the polynomial is exact for to rounding.

    A^2 is Hermitian, so its largest row sum bounds its eigenvalues, more tightly than a norm of A
    bounds those of A.
    """
    bound = 0.58 if _is_single(A2) else 0.05
    rows: Tensor = linalg.vector_norm(A2, 1, dim=-1, keepdim=True)
    return rows.amax(-2, keepdim=True) / bound**2


def _is_single(A: Tensor) -> bool:
    return A.dtype in (torch.float32, torch.complex64)


def _corrected(E: Tensor) -> Tensor:
    """`_nearest_orthogonal` of I + E, less I, which keeps the digits of a small E."""
    F = E.detach()
    excess = F + F.mH + F.mH @ F
    return E - (excess + F @ excess) / 2


def _nearest_orthogonal(Q: Tensor) -> Tensor:
    """Squaring doubles the rounding error; one Newton-Schulz step squares it.

    It is the identity on orthogonal matrices, and so needs no derivative.
    """
    frame = Q.detach()
    return Q + (frame - frame @ (frame.mH @ frame)) / 2
