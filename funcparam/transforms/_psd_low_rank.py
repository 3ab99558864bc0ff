from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_square, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg


@final
@dataclass(frozen=True)
class PSDLowRank(Transform[Tensor]):
    r"""Positive semidefinite matrices of at most a given rank: `W = F F^H`.

    For a value of shape `(..., n, n)` raw is `F`, `(..., n, rank)`. Real (symmetric) and complex
    (Hermitian). A value of this kind is kept; any other goes to the nearest one: the `rank`
    largest eigenvalues of its Hermitian part that are positive, with their eigenvectors.

    Columns of `F` that the value does not need get a length below its rounding, the root of one
    rounding of its largest eigenvalue: at 0 their gradient would be 0 too. Only of a value of zeros
    they are 0, and nothing trains.

    Args:
        rank: the number of columns of `F`, positive.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value is not square or
            smaller than `rank`.

    Example:
        >>> import torch
        >>> from funcparam.transforms import PSDLowRank
        >>> raw, state = PSDLowRank(1).right_inverse(torch.diag(torch.tensor([4.0, 1.0])))
        >>> PSDLowRank(1).forward(raw, state)
        tensor([[4., 0.],
                [0., 0.]])

    Source: Burer and Monteiro, Mathematical Programming 95 (2003); Eckart and Young,
    Psychometrika 1 (1936).
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "factor"}

    rank: int

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return raw @ raw.mH

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        spectrum, vectors = cast("tuple[Tensor, Tensor]", linalg.eigh((value + value.mH) / 2))
        noise = torch.finfo(spectrum.dtype).eps * spectrum[..., -1:].clamp_min(0)
        roots = torch.maximum(spectrum[..., -self.rank :], noise).sqrt()
        factor = vectors[..., -self.rank :] * roots.unsqueeze(-2)
        return factor.contiguous(), {}  # LAPACK's columns are apart; optimizers flatten raw

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """The largest of |W - W^H|, -eigenvalue, and |eigenvalue| beyond `rank`."""
        spectrum: Tensor = linalg.eigvalsh((value + value.mH) / 2)
        below = largest((-spectrum).clamp_min(0))
        beyond = largest(spectrum[..., : -self.rank])
        return torch.stack([largest(value - value.mH), below, beyond]).amax()

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: rotations of raw change nothing, so the"
            " Jacobian is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)
        if self.rank > value.shape[-1]:
            raise ValueError(
                f"{self!r} expects a matrix with sides of at least {self.rank};"
                f" got shape {tuple(value.shape)}"
            )
