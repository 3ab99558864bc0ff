from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import State, Transform, largest


@final
@dataclass(frozen=True)
class Mask(Transform[Tensor]):
    """Entries that are zero at init stay zero: `W = where(mask, X, 0)`.

    Raw has the shape of the value; state `{"mask"}` is a boolean tensor of that shape, the
    nonzero pattern of the value at init. `Mask()` takes no tensor: write another mask there,
    `state[name]["mask"] = mask`, to choose or to prune further; a mask of numbers is one of what is
    not 0. Real and complex. Every value is kept exactly. The log-determinant is 0 over the entries
    kept.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Mask
        >>> raw, state = Mask().right_inverse(torch.tensor([0.0, 3.0]))
        >>> Mask().forward(raw + 1, state)
        tensor([0., 4.])
    """

    def forward(self, raw: Tensor, state: State) -> Tensor:
        # where, not a product: 0 * inf would be nan
        return torch.where(state["mask"] != 0, raw, 0)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value, {"mask": value != 0}

    def project(self, value: Tensor, state: State) -> Tensor:
        return self.forward(value, state)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return self.forward(vector, state)

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| where the mask is False or 0. The mask in state is the constraint."""
        if "mask" not in state:
            raise ValueError(f"{self!r} expects state with a 'mask', which is its constraint")
        return largest(torch.where(state["mask"] != 0, 0, value))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are, or are not free."""
        return raw.real.new_zeros(())

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return state["mask"]

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return state["mask"]
