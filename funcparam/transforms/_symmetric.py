from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import State, Transform, expect_square, largest


@final
@dataclass(frozen=True)
class Symmetric(Transform[Tensor]):
    r"""Symmetric matrices: the upper triangle of raw, mirrored.

    $$W = \operatorname{triu}(X) + \operatorname{triu}(X, 1)^T$$

    Raw has the shape of the value, `(..., n, n)`; its lower triangle is unused and starts at 0.
    Real and complex (symmetric, not Hermitian). A symmetric value is kept exactly; any other
    goes to the nearest symmetric matrix, `(value + value.mT) / 2`. The log-determinant is 0.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Symmetric
        >>> Symmetric().forward(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), {})
        tensor([[1., 2.],
                [2., 3.]])
    """

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return raw.triu() + raw.triu(1).mT

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return ((value + value.mT) / 2).triu(), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W - W^T|."""
        return largest(value - value.mT)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: the free coordinates of raw are those of the value."""
        return raw.real.new_zeros(())

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return torch.ones_like(raw, dtype=torch.bool).triu()

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return torch.ones_like(value, dtype=torch.bool).triu()

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)


@final
@dataclass(frozen=True)
class Skew(Transform[Tensor]):
    r"""Skew-symmetric matrices: the strict lower triangle of raw, mirrored with a minus.

    $$W = \operatorname{tril}(X, -1) - \operatorname{tril}(X, -1)^T$$

    Raw has the shape of the value, `(..., n, n)`; the rest of it is unused and starts at 0.
    Real and complex (skew-symmetric, not skew-Hermitian). A skew value is kept exactly; any
    other goes to the nearest skew matrix, `(value - value.mT) / 2`. The log-determinant is 0.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Skew
        >>> Skew().forward(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), {})
        tensor([[ 0., -2.],
                [ 2.,  0.]])
    """

    def forward(self, raw: Tensor, state: State) -> Tensor:
        lower = raw.tril(-1)
        return lower - lower.mT

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return ((value - value.mT) / 2).tril(-1), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W + W^T|."""
        return largest(value + value.mT)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: the free coordinates of raw are those of the value."""
        return raw.real.new_zeros(())

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return torch.ones_like(raw, dtype=torch.bool).tril(-1)

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return torch.ones_like(value, dtype=torch.bool).tril(-1)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)
