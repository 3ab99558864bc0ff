from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, cast, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_matrix, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg


@final
@dataclass(frozen=True)
class LowRank(Transform[Mapping[str, Tensor]]):
    r"""Matrices of at most a given rank, as a product of two thin ones.

    $$W = B A$$

    For a value of shape `(..., m, n)` raw is `{"A": (..., rank, n), "B": (..., m, rank)}`. Real
    and complex. A value of at most this rank is kept; any other goes to the nearest one in the
    Frobenius norm, its truncated singular value decomposition `U S V^H`. Both factors take the
    square root of `S`. Where a singular value is 0, `A` gets a row that is drawn from `generator`
    or torch's default one, and `B` zeros: with zeros in both nothing would train.

    Args:
        rank: the inner dimension, positive.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions or `rank` exceeds one of the matrix's.

    Example:
        >>> import torch
        >>> from funcparam.transforms import LowRank
        >>> raw, state = LowRank(rank=1).right_inverse(torch.diag(torch.tensor([4.0, 1.0])))
        >>> LowRank(rank=1).forward(raw, state)
        tensor([[4., 0.],
                [0., 0.]])

    Source: Eckart and Young, Psychometrika 1 (1936); geotorch's `LowRank` has the same image.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": "factor", "B": "factor"}

    rank: int

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return raw["B"] @ raw["A"]

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        A, B = balanced_factors(value, self.rank, generator)
        return {"A": A, "B": B}, {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest singular value beyond `rank`."""
        return singular_value(value, self.rank)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the factors are not unique, so the Jacobian"
            " is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        if self.rank > min(value.shape[-2:]):
            raise ValueError(
                f"{self!r} expects a matrix with both sides at least {self.rank};"
                f" got shape {tuple(value.shape)}"
            )


def balanced_factors(
    matrix: Tensor, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """`A, B` such that `B @ A` is the nearest matrix of `rank`, each with half of its length.

    Where that has a lower rank, rows of `A` are drawn, and `B` is 0.
    """
    U, spectrum, Vh = cast("tuple[Tensor, Tensor, Tensor]", linalg.svd(matrix, full_matrices=False))
    top, S, rows = spectrum[..., :1], spectrum[..., :rank], Vh[..., :rank, :]
    noise = max(matrix.shape[-2:]) * torch.finfo(S.dtype).eps * top
    drawn = torch.randn(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
    rows = torch.where((noise < S).unsqueeze(-1), rows, drawn / sqrt(matrix.shape[-1]))
    length = torch.where(noise < S, S, torch.where(top > 0, top, 1)).sqrt()
    A = length.unsqueeze(-1) * rows
    B = U[..., :rank] * (torch.where(noise < S, S, 0) / length).unsqueeze(-2)
    return A.contiguous(), B.contiguous()  # singular vectors come by columns


def singular_value(matrix: Tensor, index: int) -> Tensor:
    """The largest over a batch of the singular values at `index`, counted from 0 at the top."""
    spectrum: Tensor = linalg.svdvals(matrix)
    return largest(pad(spectrum, (0, 1))[..., index])
