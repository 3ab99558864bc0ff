from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms._low_rank import singular_value
from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_all, expect_matrix
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.frames import (
    at_frames,
    between_frames,
    svd,
    with_exact_bases,
    with_moved_bases,
)
from funcparam.transforms.numerics.softplus import inverse_softplus, softplus


@final
@dataclass(frozen=True)
class FixedRank(Transform[Mapping[str, Tensor]]):
    r"""Matrices of exactly a given rank, by their singular value decomposition.

    $$W = U \operatorname{diag}(\operatorname{softplus}(S)) V^H$$

    For a value of shape `(..., m, n)` raw is `{"U": (..., m, rank), "S": (..., rank),
    "V": (..., n, rank)}`, with a real `S`. `U` and `V` are directions in which two orthonormal
    frames, state `{"base_U", "base_V"}`, are moved as [`Stiefel`][funcparam.transforms.Stiefel]
    does: a step takes about `(m + n) rank^2` operations besides the product. `forward` factorises
    nothing, so equal singular values do no harm in training; gradients through `right_inverse`,
    which takes the decomposition, are NaN there. Where `S` falls below -103 in float32 (-745
    in float64) softplus is 0, and the rank drops.

    Real and complex. A value of this rank is kept, one of a higher rank goes to the nearest, its
    truncated decomposition. To a value of a lower rank there is no nearest one;
    [`LowRank`][funcparam.transforms.LowRank] takes it. `rebase` moves the base points.

    Args:
        rank: the number of singular values, positive.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions or `rank` exceeds one of the matrix's; at init, if the value has a lower
            rank.

    Example:
        >>> import torch
        >>> from funcparam.transforms import FixedRank
        >>> raw, state = FixedRank(rank=1).right_inverse(torch.diag(torch.tensor([4.0, 1.0])))
        >>> FixedRank(rank=1).forward(raw, state)
        tensor([[4., 0.],
                [0., 0.]])

    Source: Vandereycken, Low-rank matrix completion by Riemannian optimization, SIAM J. Optim. 23
    (2013); geotorch's `FixedRank` has the same image.
    """

    roles: ClassVar[Mapping[str, Role]] = {"U": "relative", "V": "relative", "S": "coordinates"}

    rank: int

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return between_frames(raw, softplus(raw["S"]), state)

    def forward_stacked(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return self.forward(raw, state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        U, spectrum, Vh = svd(value)
        S = spectrum[..., : self.rank]
        expect_all(
            self,
            torch.finfo(S.dtype).eps * spectrum[..., :1] < S,
            f"expects a matrix of rank at least {self.rank}, to rounding; use LowRank({self.rank})",
        )
        return at_frames(U[..., : self.rank], inverse_softplus(S), Vh[..., : self.rank, :])

    @full_precision
    def refresh(self, raw: Mapping[str, Tensor], state: State) -> State:
        return with_exact_bases(state)

    @full_precision
    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        return with_moved_bases(raw, state)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest singular value beyond `rank`."""
        return singular_value(value, self.rank)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        if self.rank > min(value.shape[-2:]):
            raise ValueError(
                f"{self!r} expects a matrix with both sides at least {self.rank};"
                f" got shape {tuple(value.shape)}"
            )
