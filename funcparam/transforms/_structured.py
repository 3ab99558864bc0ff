from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_filled,
    expect_matrix,
    expect_square,
    largest,
)
from funcparam.transforms.contract.precision import full_precision


@final
@dataclass(frozen=True)
class Circulant(Transform[Tensor]):
    r"""Circulant matrices: every column is the one before it, turned down by one.

    $$W_{ij} = c_{(i - j) \bmod n}$$

    For a value of shape `(..., n, n)` raw is its first column `c`, `(..., n)`; `W @ x` is the
    circular convolution of `c` and `x`. Real and complex. A circulant value is kept; any other
    goes to the nearest one in the Frobenius norm, the mean over each wrapped diagonal.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Circulant
        >>> Circulant().forward(torch.tensor([1.0, 2.0, 3.0]), {})
        tensor([[1., 3., 2.],
                [2., 1., 3.],
                [3., 2., 1.]])

    Source: `scipy.linalg.circulant`; T. Chan, SIAM J. Sci. Stat. Comput. 9 (1988) (projection).
    """

    def forward(self, raw: Tensor, state: State) -> Tensor:
        i = torch.arange(raw.shape[-1], device=raw.device)
        return raw[..., (i.unsqueeze(1) - i) % raw.shape[-1]]

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        j = torch.arange(value.shape[-1], device=value.device)
        diagonals = value[..., (j.unsqueeze(1) + j) % value.shape[-1], j]
        return diagonals.mean(-1), {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest distance of an entry from the mean of its wrapped diagonal."""
        return largest(value - self.forward(*self.right_inverse(value)))

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)


@final
@dataclass(frozen=True)
class Toeplitz(Transform[Mapping[str, Tensor]]):
    r"""Toeplitz matrices: every diagonal is constant.

    $$W_{ij} = \begin{cases} c_{i-j} & i \ge j \\ r_{j-i-1} & i < j \end{cases}$$

    For a value of shape `(..., m, n)` raw is `{"column": c, "row": r}`: the first column,
    `(..., m)`, and the rest of the first row, `(..., n - 1)`. Real and complex. A Toeplitz value
    is kept; any other goes to the nearest one in the Frobenius norm, the mean over each diagonal.

    Raises:
        ValueError: at `fp.parametrize`, if the value has fewer than two dimensions.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Toeplitz
        >>> raw = {"column": torch.tensor([1.0, 2.0]), "row": torch.tensor([3.0, 4.0])}
        >>> Toeplitz().forward(raw, {})
        tensor([[1., 3., 4.],
                [2., 1., 3.]])

    Source: `scipy.linalg.toeplitz`, whose row has the corner as well.
    """

    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        column, row = raw["column"], raw["row"]
        diagonals = torch.cat([row.flip(-1), column], dim=-1)
        return diagonals[..., _diagonal_numbers(column.shape[-1], row.shape[-1] + 1, row.device)]

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        m, n = value.shape[-2:]
        numbers = _diagonal_numbers(m, n, value.device).flatten()
        zeros = value.new_zeros(*value.shape[:-2], m + n - 1)
        sums = zeros.index_add(-1, numbers, value.flatten(-2))
        k = torch.arange(m + n - 1, device=value.device)
        lengths = torch.minimum(k + 1, m + n - 1 - k).clamp(max=min(m, n))
        means = sums / lengths
        column, row = means[..., n - 1 :].contiguous(), means[..., : n - 1].flip(-1)
        return {"column": column, "row": row}, {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest distance of an entry from the mean of its diagonal."""
        return largest(value - self.forward(*self.right_inverse(value)))

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value)


def _diagonal_numbers(m: int, n: int, device: torch.device) -> Tensor:
    """The number of each entry's diagonal, from 0 at the upper right corner."""
    return torch.arange(m, device=device).unsqueeze(1) - torch.arange(n, device=device) + n - 1


@final
@dataclass(frozen=True)
class BlockDiagonal(Transform[Tensor]):
    r"""Block diagonal matrices: equal blocks along the diagonal, zeros elsewhere.

    $$W = \operatorname{diag}(X_1, \dots, X_k)$$

    For a value of shape `(..., m, n)` raw is `(..., blocks, m / blocks, n / blocks)`. Real and
    complex. A block diagonal value is kept exactly; any other loses what is outside of the
    blocks, which is the nearest one in the Frobenius norm.

    Args:
        blocks: the number of blocks, positive.

    Raises:
        ValueError: `blocks` is not positive; at `fp.parametrize`, if the value has fewer than
            two dimensions or `blocks` does not divide both sides of the matrix.

    Example:
        >>> import torch
        >>> from funcparam.transforms import BlockDiagonal
        >>> BlockDiagonal(blocks=2).forward(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), {})
        tensor([[1., 2., 0., 0.],
                [0., 0., 3., 4.]])

    Source: `torch.block_diag`.
    """

    blocks: int

    def __post_init__(self) -> None:
        expect_argument(self, "blocks", POSITIVE_INTEGER)

    def forward(self, raw: Tensor, state: State) -> Tensor:
        # the block's number along two new dimensions, in front of its rows and of its columns
        spread = torch.diag_embed(raw.movedim(-3, -1), dim1=-4, dim2=-2)
        return spread.flatten(-2).flatten(-3, -2)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        m, n = value.shape[-2:]
        k = self.blocks
        spread = value.reshape(*value.shape[:-2], k, m // k, k, n // k)
        return spread.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous(), {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| outside of the blocks."""
        return largest(value - self.forward(*self.right_inverse(value)))

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        if any(side % self.blocks for side in value.shape[-2:]):
            raise ValueError(
                f"{self!r} expects a matrix with both sides divisible by {self.blocks};"
                f" got shape {tuple(value.shape)}"
            )
