"""Norms of slices of any scale, with derivatives of every order where a slice is zero."""

from __future__ import annotations

from torch import Tensor

Dims = tuple[int, ...] | list[int]


def norms(X: Tensor, dims: Dims) -> Tensor:
    """The 2-norm over `dims`, which stay with size 1; squares neither overflow nor vanish.

    A slice of zeros has the norm 0 with derivatives 0, where the root has none.
    """
    if X.numel() == 0:  # has no largest entry
        return X.abs().sum(dims, keepdim=True)
    size, _, square = _scaled(X, dims)
    return square.sqrt() * size


def directions(X: Tensor, dims: Dims) -> Tensor:
    """X divided by its norms over `dims`; zeros stay zeros."""
    if X.numel() == 0:
        return X
    _, unit, square = _scaled(X, dims)
    return unit * square.rsqrt()  # the derivative of a division passes over X more often


def _scaled(X: Tensor, dims: Dims) -> tuple[Tensor, Tensor, Tensor]:
    """The largest entries in size, X divided by them, and the squared norms of that, of zeros 1.

    The norm grows with the scale, so constant ones are exact in every derivative. Squares of what
    is scaled are as good as PyTorch's norm, which has no third derivatives.
    """
    size = (
        X.detach().abs().amax(dims, keepdim=True)
    )  # PyTorch's norm of inf takes ten times as long
    is_zero = size == 0
    unit = X / (size + is_zero)
    square = (unit.conj() * unit).real if unit.is_complex() else unit.square()
    return size, unit, square.sum(dims, keepdim=True) + is_zero
