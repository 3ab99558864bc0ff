from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_all,
    expect_dim,
    expect_real,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.softplus import inverse_softplus, softplus


@final
@dataclass(frozen=True)
class Ordered(Transform[Tensor]):
    r"""Entries that increase strictly along the last dimension.

    $$W_1 = X_1, \qquad W_k = W_{k-1} + \operatorname{softplus}(X_k)$$

    Raw has the shape of the value. Real dtypes. The right inverse is exact, that of softplus at
    the differences. Log-determinant: the sum of $\log \sigma(X_k)$ over all but the first.

    A step below the rounding of the entries it joins is lost: they are equal then.

    Raises:
        ValueError: at `fp.parametrize`, if the value has no dimension; at init, if it does not
            increase.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Ordered
        >>> raw, state = Ordered().right_inverse(torch.tensor([-1.0, 0.5, 2.0]))
        >>> Ordered().forward(raw, state)
        tensor([-1.0000,  0.5000,  2.0000])

    Source: Stan reference manual, ordered vector, with softplus for the exponential, as in TFP's
    `Ascending`.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return torch.cat([raw[..., :1], softplus(raw[..., 1:])], dim=-1).cumsum(-1)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        steps = value.diff(dim=-1)
        expect_all(
            self, steps > 0, "expects entries that increase along the last dimension; sort first"
        )
        return torch.cat([value[..., :1], inverse_softplus(steps)], dim=-1), {}

    def project(self, value: Tensor, state: State) -> Tensor:
        """The largest entry so far, which is no step down; not the nearest."""
        return value.cummax(-1).values

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """The largest step down."""
        return largest((-value.diff(dim=-1)).clamp_min(0))

    @full_precision
    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        return logsigmoid(raw[..., 1:]).sum()

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return None

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return None

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_dim(self, value, -1)
