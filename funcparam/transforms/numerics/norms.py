"""Norms of slices of any scale, with derivatives of every order where a slice is zero."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from funcparam.transforms.numerics.linalg import linalg


def norms(X: Tensor, dims: list[int] | tuple[int, ...]) -> Tensor:
    """The 2-norm over `dims`, which stay with size 1; squares neither overflow nor vanish.

    A slice of zeros has the norm 0 with derivatives 0, where the root has none.
    """
    if X.numel() == 0:  # has no largest entry
        return X.abs().sum(dims, keepdim=True)
    size = X.detach().abs().amax(dims, keepdim=True)
    # The norm grows with the scale, so a constant one is exact in every derivative.
    scale = torch.where((size > 0) & (size < inf), size, 1)
    norm: Tensor = linalg.vector_norm(torch.where(size == 0, 1, X / scale), dim=dims, keepdim=True)
    return torch.where(size == 0, 0, norm * scale)
