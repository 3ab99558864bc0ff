"""Norms of slices of any scale, with derivatives of every order where a slice is zero."""

from __future__ import annotations

from math import inf

from torch import Tensor

from funcparam.transforms.numerics.linalg import linalg

Dims = tuple[int, ...] | list[int]


def norms(X: Tensor, dims: Dims) -> Tensor:
    """The 2-norm over `dims`, which stay with size 1; squares neither overflow nor vanish.

    A slice of zeros has the norm 0 with derivatives 0, where the root has none.
    """
    if X.numel() == 0:  # has no largest entry
        return X.abs().sum(dims, keepdim=True)
    size, _, length = _scaled(X, dims)
    return length * size


def directions(X: Tensor, dims: Dims) -> Tensor:
    """X divided by its norms over `dims`; zeros stay zeros."""
    if X.numel() == 0:
        return X
    _, unit, length = _scaled(X, dims)
    return unit / length


def _scaled(X: Tensor, dims: Dims) -> tuple[Tensor, Tensor, Tensor]:
    """The largest entries in size, X divided by them, and the norms of that, of zeros 1.

    The norm grows with the scale, so constant ones are exact in every derivative. Squares of what
    is scaled are as good as PyTorch's norm, which has no third derivatives.
    """
    size: Tensor = linalg.vector_norm(X.detach(), inf, dim=dims, keepdim=True)
    is_zero = size == 0
    unit = X / (size + is_zero)
    square = (unit.conj() * unit).real if unit.is_complex() else unit.square()
    return size, unit, (square.sum(dims, keepdim=True) + is_zero).sqrt()
