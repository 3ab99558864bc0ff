from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from funcparam.transforms.contract.arguments import expect_choice
from funcparam.transforms.contract.base import State, Transform, expect_range, expect_real, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.inside import least_positive
from funcparam.transforms.numerics.softplus import inverse_softplus, softplus


@final
@dataclass(frozen=True)
class Positive(Transform[Tensor]):
    r"""Positive entries, by one of three maps.

    | map | value | right inverse | log-determinant |
    |---|---|---|---|
    | `"softplus"` | `W = log(1 + exp(X))` | `W + log(1 - exp(-W))` | `sum(log(sigmoid(X)))` |
    | `"exp"` | `W = exp(X)` | `log(W)` | `sum(X)` |
    | `"square"` | `W = X^2` | `sqrt(W)` | `sum(log(2 |X|))` |

    Raw has the shape of the value. Real dtypes. Every positive value is kept. The sign of raw is
    lost under `"square"`; the log-determinant is that of each of the two branches.

    Softplus grows no faster than raw and is the safe choice. The exponential trains scales at
    equal relative speed; above about 88 in float32 (709 in float64) it overflows. Neither
    vanishes: below the least normal number (float16: the least number) it is that. The square has
    no gradient where raw is 0, and its value there is 0.

    Args:
        map: `"softplus"`, `"exp"` or `"square"`.

    Raises:
        ValueError: `map` is none of the three; at init, if an entry is not positive.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Positive
        >>> raw, state = Positive().right_inverse(torch.tensor([0.5, 2.0]))
        >>> Positive().forward(raw, state)
        tensor([0.5000, 2.0000])
        >>> Positive("square").forward(torch.tensor([-3.0]), {})
        tensor([9.])

    Source: `SoftplusTransform` and `ExpTransform` of `torch.distributions.transforms`.
    """

    is_entrywise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    map: Literal["softplus", "exp", "square"] = "softplus"

    def __post_init__(self) -> None:
        expect_choice(self, "map", _MAPS)

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return self._forward(raw, state, torch.finfo(raw.dtype))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        expect_range(self, value, value > 0, "to be positive")
        return _MAPS[self.map].inverse(value), {}

    def project(self, value: Tensor, state: State) -> Tensor:
        """What is not positive becomes the smallest normal number."""
        return value.clamp_min(torch.finfo(value.dtype).tiny)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the least entry is below 0."""
        return largest((-value).clamp_min(0))

    @full_precision
    def log_derivative(self, raw: Tensor, state: State) -> Tensor:
        return _MAPS[self.map].log_derivative(raw)

    def check(self, value: Tensor) -> None:
        expect_real(self, value)

    @full_precision
    def _forward(self, raw: Tensor, state: State, rounded_to: torch.finfo) -> Tensor:
        value = _MAPS[self.map].forward(raw)
        if self.map == "square":
            return value
        return value.clamp_min(least_positive(value.dtype, rounded_to))


class _Map(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    log_derivative: Callable[[Tensor], Tensor]


def _identity(X: Tensor) -> Tensor:
    return X


def _log_of_twice(X: Tensor) -> Tensor:
    return torch.log(2 * X.abs())


_MAPS: Mapping[str, _Map] = {
    "softplus": _Map(softplus, inverse_softplus, logsigmoid),
    "exp": _Map(torch.exp, torch.log, _identity),
    "square": _Map(torch.square, torch.sqrt, _log_of_twice),
}
