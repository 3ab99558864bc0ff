from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms._structured import Circulant
from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_matrix, largest
from funcparam.transforms.contract.precision import full_precision


@final
@dataclass(frozen=True)
class BlockCirculant(Transform[Tensor]):
    r"""Matrices of equal square blocks, each of them circulant.

    $$W_{pb + i,\, qb + j} = c_{p, q, (i - j) \bmod b}$$

    For a value of shape `(..., m, n)` raw is `(..., m / size, n / size, size)`: the first column of
    each block, as in [`Circulant`][funcparam.transforms.Circulant]. It has `size` times fewer
    entries than the value. Real and complex. Such a value is kept; any other goes to the nearest
    one in the Frobenius norm, the mean over each wrapped diagonal of each block.

    Args:
        size: the side `b` of a block, positive.

    Raises:
        ValueError: `size` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions or `size` does not divide its last two.

    Example:
        >>> import torch
        >>> from funcparam.transforms import BlockCirculant
        >>> BlockCirculant(2).forward(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), {})
        tensor([[1., 2., 3., 4.],
                [2., 1., 4., 3.]])

    Source: Ding et al., CirCNN, arXiv 1708.08917; Chen et al., C3A, arXiv 2407.19342 (behind a
    frozen weight).
    """

    size: int

    def __post_init__(self) -> None:
        expect_argument(self, "size", POSITIVE_INTEGER)

    def forward(self, raw: Tensor, state: State) -> Tensor:
        blocks = Circulant().forward(raw, {})  # (..., p, q, i, j)
        return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        b, (m, n) = self.size, value.shape[-2:]
        blocks = value.reshape(*value.shape[:-2], m // b, b, n // b, b).transpose(-3, -2)
        return Circulant().right_inverse(blocks)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest distance of an entry from the mean of its wrapped diagonal."""
        return largest(value - self.forward(*self.right_inverse(value)))

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        if any(side % self.size for side in value.shape[-2:]):
            raise ValueError(
                f"{self!r} expects a matrix with both sides divisible by {self.size};"
                f" got shape {tuple(value.shape)}"
            )
