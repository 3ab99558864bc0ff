from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import expect_choice
from funcparam.transforms.contract.base import State, Transform, expect_matrix, largest


@final
@dataclass(frozen=True)
class Triangular(Transform[Tensor]):
    r"""Triangular matrices: `W = tril(X)`, or `triu(X)`.

    Raw has the shape of the value, `(..., m, n)`; the other triangle is unused and starts at 0.
    Real and complex. A triangular value is kept exactly; any other goes to its triangle, the
    nearest triangular matrix. The log-determinant is 0.

    Args:
        upper: whether the upper triangle is kept instead of the lower one.

    Raises:
        ValueError: at `fp.parametrize`, if the value has fewer than two dimensions.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Triangular
        >>> Triangular().forward(torch.ones(2, 2), {})
        tensor([[1., 0.],
                [1., 1.]])

    Source: `torch.distributions.constraints.lower_triangular`.
    """

    upper: bool = False

    def __post_init__(self) -> None:
        expect_choice(self, "upper", (True, False))

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return raw.triu() if self.upper else raw.tril()

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return self.forward(value, {}), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| of the other triangle."""
        return largest(value.tril(-1) if self.upper else value.triu(1))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: the free coordinates of raw are those of the value."""
        return raw.real.new_zeros(())

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return self.forward(torch.ones_like(raw, dtype=torch.bool), {})

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return self.forward(torch.ones_like(value, dtype=torch.bool), {})

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
