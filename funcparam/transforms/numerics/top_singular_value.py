"""The largest singular value, whose derivatives do not ask for gaps between the others."""

from __future__ import annotations

from math import inf
from typing import cast

import torch
from torch import Tensor

from funcparam.transforms.contract.base import largest
from funcparam.transforms.numerics.linalg import linalg


def top_singular_value(X: Tensor) -> Tensor:
    """The spectral norm of a matrix with entries, with derivatives up to the third.

    PyTorch's second derivatives divide by the gaps between all singular values, and are NaN where
    two are equal. Here the Gram matrix of the shorter side is turned into its own eigenvectors,
    which are constants. There perturbation theory gives the top vector to first order, and the
    Rayleigh quotient of that the top value to third. Only gaps to the top count. Where the top
    itself is repeated the norm has a kink, and this is the derivative of one branch.

    Source: Kato, Perturbation Theory for Linear Operators (1966), section II.2.
    """
    size = largest(X.detach())
    size = torch.where((size > 0) & (size < inf), size, 1)  # no square overflows or vanishes
    scaled = X / size
    gram = scaled.mH @ scaled if X.shape[0] > X.shape[1] else scaled @ scaled.mH
    spectrum, vectors = cast("tuple[Tensor, Tensor]", linalg.eigh(gram.detach()))
    turned = vectors.mH @ gram @ vectors
    top, others = spectrum[-1:], spectrum[:-1]
    rounding = len(spectrum) * torch.finfo(spectrum.dtype).eps * top
    gaps = torch.where(top - others > rounding, top - others, inf)
    vector = torch.cat([turned[:-1, -1] / gaps, torch.ones_like(turned[-1, -1:])])
    quotient = torch.vdot(vector, turned @ vector).real / torch.vdot(vector, vector).real
    root = torch.where(quotient > 0, quotient, 1).sqrt()
    return size * torch.where(quotient > 0, root, 0)
