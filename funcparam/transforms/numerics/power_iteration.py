"""The top singular vectors of a matrix, a few steps nearer."""

from __future__ import annotations

import torch
from torch import Tensor

from funcparam.transforms.numerics.linalg import linalg


def power_iteration(
    X: Tensor, u: Tensor, v: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors after some iterations from `u` and `v`.

    Source: Miyato et al., Spectral Normalization for GANs, arXiv 1802.05957, algorithm 1.
    """
    for _ in range(iterations):
        u = direction(X @ v, u, eps)
        v = direction(X.mH @ u, v, eps)
    return u, v


def direction(vector: Tensor, last: Tensor, eps: float) -> Tensor:
    """`vector` with norm 1; the last one where its norm is below `eps` or overflows."""
    norm: Tensor = linalg.vector_norm(vector, dim=-1, keepdim=True)
    normal = torch.finfo(norm.dtype)
    usable = norm.clamp(max(eps, normal.tiny), normal.max)
    return torch.where(norm == usable, vector / usable, last)
