from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_all, expect_dim, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.norms import norms


@final
@dataclass(frozen=True)
class UnitNorm(Transform[Tensor]):
    r"""Vectors of length 1 along a dimension: `W = X / |X|`.

    Raw has the shape of the value and starts as the value. Real and complex. A value of this
    kind is kept; any other goes to the nearest one, `value / |value|`. Gradients are orthogonal
    to raw and shrink as `1 / |X|`; where raw is zero the value is zero.

    Args:
        dim: the dimension along which lengths are 1. -1: rows of a matrix; 0: its columns.

    Raises:
        ValueError: at `fp.parametrize`, if the value has no dimension `dim` or no entry along
            it; at init, if a vector is zero.

    Example:
        >>> import torch
        >>> from funcparam.transforms import UnitNorm
        >>> UnitNorm().forward(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), {})
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])

    Source: Absil, Mahony and Sepulchre, Optimization Algorithms on Matrix Manifolds (2008),
    section 4.1 (the projective retraction of the sphere).
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "direction"}

    stacks_up_to: ClassVar[int] = 64 * 64
    stacks_from: ClassVar[int] = 8

    dim: int = -1

    def __post_init__(self) -> None:
        expect_argument(self, "dim", INTEGER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        norm = norms(raw, (self.dim,))
        return raw / torch.where(norm == 0, 1, norm)

    def forward_stacked(self, raw: Tensor, state: State) -> Tensor:
        return self.forward(raw, state) if self.dim < 0 else super().forward_stacked(raw, state)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        expect_all(
            self,
            (value != 0).any(self.dim),
            f"expects no vector along dim {self.dim} to be zero: it has no direction",
        )
        return value, {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest ||W| - 1|."""
        return largest(norms(value, (self.dim,)) - 1)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the length of raw is lost, so its Jacobian"
            " is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_dim(self, value, self.dim)
        if value.shape[self.dim] == 0:
            raise ValueError(
                f"{self!r} expects at least one entry along dim {self.dim};"
                f" got shape {tuple(value.shape)}"
            )
