"""What transforms of convolution kernels share; kernels are (out, in / groups, *taps)."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from funcparam.transforms.contract.base import AnyTransform
from funcparam.transforms.numerics.linalg import linalg

# as with linalg: from Any, annotated names are typed
fft: Any = torch.fft


def grouped(kernel: Tensor, groups: int) -> Tensor:
    """The groups along a dimension of their own: (groups, out / groups, in / groups, *taps)."""
    return kernel.reshape(groups, kernel.shape[0] // groups, *kernel.shape[1:])


def lag_sums(kernel: Tensor) -> Tensor:
    """Sum |sum_t X_t^T X_{t + lag}| over all lags of a grouped kernel: (groups, in, in).

    A product for each lag and no convolution, which accelerators may compute in fewer bits. One
    lag of two is enough: the other's product is its transpose.
    """
    by_input, taps = kernel.transpose(1, 2), kernel.shape[3:]
    zero = (0,) * len(taps)
    total = _overlap(by_input, zero).abs()
    for lag in product(*(range(1 - size, size) for size in taps)):
        if lag > zero:
            gram = _overlap(by_input, lag).abs()
            total = total + gram + gram.mT
    return total


def _overlap(by_input: Tensor, lag: tuple[int, ...]) -> Tensor:
    sides = list(zip(lag, by_input.shape[3:], strict=True))
    early = by_input[(..., *(slice(max(-s, 0), size - max(s, 0)) for s, size in sides))]
    late = by_input[(..., *(slice(max(s, 0), size - max(-s, 0)) for s, size in sides))]
    return early.flatten(2) @ late.flatten(2).mT


def operator_norm(kernel: Tensor) -> Tensor:
    """The largest singular value of a real grouped kernel's convolution with circular padding.

    The input's sides are four times the kernel's: a singular value for each frequency.
    """
    if not kernel.numel():
        return kernel.new_zeros(())
    taps = kernel.shape[3:]
    response: Tensor = kernel
    if taps:
        response = fft.rfftn(kernel, [4 * size for size in taps], tuple(range(3, kernel.ndim)))
    norms: Tensor = linalg.matrix_norm(response.movedim((1, 2), (-2, -1)), 2)
    return norms.amax()


def expect_groups(transform: AnyTransform, value: Tensor, groups: int) -> None:
    """Raise ValueError unless the outputs of a kernel can be parted into groups."""
    if value.shape[0] % groups:
        raise ValueError(
            f"{transform!r} expects a number of outputs that {groups} divides;"
            f" got shape {tuple(value.shape)}"
        )
