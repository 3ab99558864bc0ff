from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import State, Transform


@final
@dataclass(frozen=True)
class Identity(Transform[Tensor]):
    """No constraint: `W = X`, of any floating-point or complex dtype. The log-determinant is 0.

    A name without a rule needs no transform. This one is for places that ask for one: a part of
    [`Cat`][funcparam.transforms.Cat], or what
    [`from_constraint`][funcparam.transforms.from_constraint] makes of `real`.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Identity
        >>> Identity().forward(torch.tensor([1.0]), {})
        tensor([1.])
    """

    moves_entries: ClassVar[bool] = True

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return raw

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value, {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero."""
        return value.real.new_zeros(())

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero."""
        return raw.real.new_zeros(())
