"""The largest singular value, whose derivatives do not ask for gaps between the others."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from funcparam.transforms.contract.base import largest
from funcparam.transforms.numerics.linalg import linalg


def top_singular_value(X: Tensor) -> Tensor:
    """The spectral norm of a matrix with entries, with derivatives up to the third.

    PyTorch's second derivatives divide by the gaps between all singular values, and are NaN where
    two are equal. Here the singular vectors are constants, perturbation theory gives the top one to
    first order, and the length of what the matrix makes of that is the top value to third. Only
    gaps to the top count. Where the top itself is repeated the norm has a kink, and this is the
    derivative of one branch.

    Source: Kato, Perturbation Theory for Linear Operators (1966), section II.2.
    """
    wide = X.mH if X.shape[0] > X.shape[1] else X
    size = largest(X.detach())
    is_zero = size == 0
    wide = wide / (size + is_zero)  # no square overflows or vanishes
    fixed = wide.detach()
    spectrum, vectors = cast("tuple[Tensor, Tensor]", linalg.eigh(fixed @ fixed.mH))
    gaps = spectrum[-1] - spectrum
    others = gaps > len(gaps) * torch.finfo(gaps.dtype).eps * spectrum[-1]
    top = vectors[:, -1]
    turn = vectors.mH @ (wide @ (wide.mH @ top))
    vector = top + vectors @ (turn * (others / torch.where(others, gaps, 1)))
    image = wide.mH @ vector
    quotient = torch.vdot(image, image).real / torch.vdot(vector, vector).real
    return size * (quotient + is_zero).sqrt()
