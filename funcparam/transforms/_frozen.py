from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import State, Transform, largest


@final
@dataclass(frozen=True)
class Frozen(Transform[Mapping[str, Tensor]]):
    """A value that is not trained: it is in state `{"value"}`, and raw is an empty dict.

    Any shape and dtype, integers included. The log-determinant is 0: nothing is free.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Frozen
        >>> Frozen().right_inverse(torch.tensor([1, 2]))
        ({}, {'value': tensor([1, 2])})
    """

    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return state["value"]

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        return {}, {"value": value}

    def kept_weight(self, state: State) -> Tensor | None:
        return state["value"]

    def project(self, value: Tensor, state: State) -> Tensor:
        return state["value"]

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return torch.zeros_like(vector)

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |value - frozen value|. The value in state is the constraint."""
        if "value" not in state:
            raise ValueError(f"{self!r} expects state with a 'value', which is its constraint")
        frozen = state["value"]
        if not (value.is_floating_point() or value.is_complex()):
            value, frozen = value.double(), frozen.double()
        return largest(value - frozen)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        """Zero: nothing is free."""
        return torch.zeros((), device=state["value"].device)

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return torch.zeros_like(value, dtype=torch.bool)

    def check(self, value: Tensor) -> None:
        """Everything can be frozen."""
