from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms._low_rank import balanced_factors, singular_value
from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_filled, expect_matrix
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role


@final
@dataclass(frozen=True)
class Monarch(Transform[Mapping[str, Tensor]]):
    r"""Monarch matrices: two block diagonal matrices with a permutation around each.

    $$W_{(l j), (k i)} = L_{j l k} \, R_{k j i}$$

    For `b` blocks and a value of shape `(..., m, n)` raw is `{"L": (..., b, m / b, b),
    "R": (..., b, b, n / b)}`: `W @ x` applies the blocks of `R` to parts of `x`, exchanges the
    block's number and the place in it, applies the blocks of `L`, and exchanges again. Real and
    complex. A Monarch matrix is kept; any other value goes to the nearest one in the Frobenius
    norm: for each `j` and `k` the entries are of rank 1 in `l` and `i`, so their largest
    singular value and vectors are what is kept.

    Args:
        blocks: the number of blocks of both, positive.

    Raises:
        ValueError: `blocks` is not positive; at `fp.parametrize`, if the value has fewer than
            two dimensions or `blocks` does not divide both sides of the matrix.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Monarch
        >>> raw, state = Monarch(blocks=2).right_inverse(torch.eye(4))
        >>> torch.allclose(Monarch(blocks=2).forward(raw, state), torch.eye(4))
        True

    Source: Dao et al., Monarch, arXiv 2204.00595, definition 3.1 and section 3.3 (projection).
    """

    roles: ClassVar[Mapping[str, Role]] = {"L": "factor", "R": "factor"}

    blocks: int

    def __post_init__(self) -> None:
        expect_argument(self, "blocks", POSITIVE_INTEGER)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        # dimensions l, j, k, i
        left = raw["L"].transpose(-3, -2).unsqueeze(-1)
        right = raw["R"].transpose(-3, -2).unsqueeze(-4)
        return (left * right).flatten(-2).flatten(-3, -2)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        # (j, k, 1, i) and (j, k, l, 1)
        right, left = balanced_factors(self._slices(value), 1, generator)
        return {
            "L": left.squeeze(-1).transpose(-2, -1).contiguous(),
            "R": right.squeeze(-2).transpose(-3, -2).contiguous(),
        }, {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest second singular value of the slices that are to be of rank 1."""
        return singular_value(self._slices(value), 1)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the factors' scale is not unique, so the"
            " Jacobian is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value)
        if any(side % self.blocks for side in value.shape[-2:]):
            raise ValueError(
                f"{self!r} expects a matrix with both sides divisible by {self.blocks};"
                f" got shape {tuple(value.shape)}"
            )

    def _slices(self, value: Tensor) -> Tensor:
        """The entries as (..., j, k, l, i)."""
        (m, n), b = value.shape[-2:], self.blocks
        spread = value.reshape(*value.shape[:-2], m // b, b, b, n // b)
        return spread.movedim(-4, -2)
