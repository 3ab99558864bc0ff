from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import State, Transform, expect_square, largest


@final
@dataclass(frozen=True)
class Diagonal(Transform[Tensor]):
    r"""Diagonal matrices: `W = diag(x)`.

    For a value of shape `(..., n, n)` raw is its diagonal, `(..., n)`. Real and complex. A diagonal
    value is kept exactly; any other loses what is off the diagonal, which is the nearest one in
    the Frobenius norm. The log-determinant is 0.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Diagonal
        >>> Diagonal().forward(torch.tensor([1.0, 2.0]), {})
        tensor([[1., 0.],
                [0., 2.]])

    Source: `torch.diag_embed`.
    """

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return raw.diag_embed()

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value.diagonal(dim1=-2, dim2=-1).contiguous(), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| off the diagonal."""
        return largest(value - self.forward(*self.right_inverse(value)))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are."""
        return raw.real.new_zeros(())

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return None

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return self.forward(torch.ones_like(value.diagonal(dim1=-2, dim2=-1)), {}) != 0

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)
