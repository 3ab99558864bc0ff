from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from funcparam.transforms.contract.arguments import NUMBER, expect_argument
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_numbers,
    expect_range,
    expect_real,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.inside import beside, inside, is_narrower
from funcparam.transforms.numerics.softplus import inverse_softplus, softplus


@final
@dataclass(frozen=True)
class Interval(Transform[Tensor]):
    r"""Entries strictly between two bounds: `W = low + (high - low) sigmoid(X)`.

    Raw has the shape of the value. State `{"low", "high"}` holds the bounds as scalars, so that
    they can be moved or swept with `vmap`; `low` and `high` here are what init writes there,
    numbers and no tensors. Real dtypes. The right inverse is exact, the logit of
    `(W - low) / (high - low)`. A value that would round to a bound is the next number of its
    dtype inside of it, or the one behind, with the derivative of the formula.
    Log-determinant: `sum(log(high - low) + log sigmoid(X) + log sigmoid(-X))`.

    Args:
        low: the lower bound, finite.
        high: the upper bound, finite, above `low`.

    Raises:
        ValueError: the bounds are not finite or not in order; at `fp.parametrize`, if the dtype of
            the value has no such bounds, or hardly a number between them; at init, if an entry is
            not strictly between them.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Interval
        >>> raw, state = Interval(-1, 1).right_inverse(torch.tensor([0.5]))
        >>> Interval(-1, 1).forward(raw, state)
        tensor([0.5000])
        >>> Interval(-1, 1).forward(raw, {**state, "high": torch.tensor(3.0)})
        tensor([2.])

    Source: Stan reference manual, lower and upper bounded scalar.
    """

    is_entrywise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    low: float
    high: float

    def __post_init__(self) -> None:
        expect_argument(self, "low", NUMBER)
        expect_argument(self, "high", NUMBER)
        if self.low >= self.high:
            raise ValueError(
                f"Interval expects low to be below high; got low={self.low}, high={self.high}"
            )

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return self._forward(raw, state, torch.finfo(raw.dtype))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        inside = (value > self.low) & (value < self.high)
        expect_range(self, value, inside, f"strictly between {self.low} and {self.high}")
        raw = torch.logit((value - self.low) / (self.high - self.low))
        return raw, {
            "low": value.new_full((), self.low),
            "high": value.new_full((), self.high),
        }

    def project(self, value: Tensor, state: State) -> Tensor:
        """What is not inside becomes the number next to the bound.

        The bounds in state count if they are given, here and in `violation`.
        """
        low, high = _bound(value, state, "low", self.low), _bound(value, state, "high", self.high)
        return value.clamp(torch.nextafter(low, high), torch.nextafter(high, low))

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the farthest entry is outside; the bounds in state count if they are given."""
        low, high = state.get("low", self.low), state.get("high", self.high)
        return largest(torch.maximum(low - value, value - high).clamp_min(0))

    @full_precision
    def log_derivative(self, raw: Tensor, state: State) -> Tensor:
        width = torch.log(state["high"] - state["low"])
        return width + logsigmoid(raw) + logsigmoid(-raw)

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        width = self.high - self.low
        expect_numbers(self, value.dtype, or_zero=True, low=self.low, high=self.high)
        expect_numbers(self, torch.promote_types(value.dtype, torch.float32), width=width)
        step = max(abs(self.low), abs(self.high)) * torch.finfo(value.dtype).eps
        if width < 3 * step:
            raise ValueError(
                f"{self!r} expects bounds with several numbers of {str(value.dtype)[6:]} between"
                f" them, which are up to {step:.2g} apart there. Use a wider dtype for the weight"
            )

    @full_precision
    def _forward(self, raw: Tensor, state: State, rounded_to: torch.finfo) -> Tensor:
        low, high = state["low"], state["high"]
        place = raw.sigmoid()
        # lerp meets both ends exactly, where low + (high - low) may round beyond
        if is_narrower(rounded_to, raw.dtype):
            return inside(torch.lerp(low, high, place), rounded_to, low, high)
        return torch.lerp(beside(low, high), beside(high, low), place)


@final
@dataclass(frozen=True)
class LowerBound(Transform[Tensor]):
    r"""Entries above a bound: `W = low + softplus(X)`.

    Raw has the shape of the value. State `{"low"}` holds the bound as a scalar, so that it can
    be moved or swept with `vmap`; `low` here is what init writes there. Real dtypes. The right
    inverse is exact, that of softplus at `W - low`. No value rounds to the bound.
    Log-determinant: `sum(log(sigmoid(X)))`.

    Args:
        low: the lower bound, finite.

    Raises:
        ValueError: the bound is not finite; at `fp.parametrize`, if the dtype of the value has no
            such number; at init, if an entry is not above it.

    Example:
        >>> import torch
        >>> from funcparam.transforms import LowerBound
        >>> raw, state = LowerBound(-1).right_inverse(torch.tensor([0.5]))
        >>> LowerBound(-1).forward(raw, state)
        tensor([0.5000])
        >>> LowerBound(-1).forward(raw, {"low": torch.tensor(3.0)})
        tensor([4.5000])

    Source: Stan reference manual, lower bounded scalar, with softplus for the exponential.
    """

    is_entrywise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    low: float

    def __post_init__(self) -> None:
        expect_argument(self, "low", NUMBER)

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return self._forward(raw, state, torch.finfo(raw.dtype))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        expect_range(self, value, value > self.low, f"above {self.low}")
        return inverse_softplus(value - self.low), {"low": value.new_full((), self.low)}

    def project(self, value: Tensor, state: State) -> Tensor:
        """What is not above becomes the number next to the bound, that in state if it is given."""
        low = _bound(value, state, "low", self.low)
        return value.clamp_min(torch.nextafter(low, torch.full_like(low, torch.inf)))

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the least entry is below the bound; the one in state counts if it is given."""
        return largest((state.get("low", self.low) - value).clamp_min(0))

    def log_derivative(self, raw: Tensor, state: State) -> Tensor:
        return logsigmoid(raw)

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_numbers(self, value.dtype, or_zero=True, low=self.low)

    @full_precision
    def _forward(self, raw: Tensor, state: State, rounded_to: torch.finfo) -> Tensor:
        low = state["low"]
        if is_narrower(rounded_to, raw.dtype):
            return inside(low + softplus(raw), rounded_to, low=low)
        return beside(low, inf) + softplus(raw)


@final
@dataclass(frozen=True)
class UpperBound(Transform[Tensor]):
    r"""Entries below a bound: `W = high - softplus(X)`.

    Raw has the shape of the value; a larger raw is a smaller value. State `{"high"}` holds the
    bound as a scalar, so that it can be moved or swept with `vmap`; `high` here is what init
    writes there. Real dtypes. The right inverse is exact, that of softplus at `high - W`. No value
    rounds to the bound.
    Log-determinant: `sum(log(sigmoid(X)))`.

    Args:
        high: the upper bound, finite.

    Raises:
        ValueError: the bound is not finite; at `fp.parametrize`, if the dtype of the value has no
            such number; at init, if an entry is not below it.

    Example:
        >>> import torch
        >>> from funcparam.transforms import UpperBound
        >>> raw, state = UpperBound(1).right_inverse(torch.tensor([0.5]))
        >>> UpperBound(1).forward(raw, state)
        tensor([0.5000])

    Source: Stan reference manual, upper bounded scalar, with softplus for the exponential.
    """

    is_entrywise: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    high: float

    def __post_init__(self) -> None:
        expect_argument(self, "high", NUMBER)

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return self._forward(raw, state, torch.finfo(raw.dtype))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        expect_range(self, value, value < self.high, f"below {self.high}")
        return inverse_softplus(self.high - value), {"high": value.new_full((), self.high)}

    def project(self, value: Tensor, state: State) -> Tensor:
        """What is not below becomes the number next to the bound, that in state if it is given."""
        high = _bound(value, state, "high", self.high)
        return value.clamp_max(torch.nextafter(high, torch.full_like(high, -torch.inf)))

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the largest entry is above the bound; the one in state counts if it is given."""
        return largest((value - state.get("high", self.high)).clamp_min(0))

    def log_derivative(self, raw: Tensor, state: State) -> Tensor:
        return logsigmoid(raw)

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_numbers(self, value.dtype, or_zero=True, high=self.high)

    @full_precision
    def _forward(self, raw: Tensor, state: State, rounded_to: torch.finfo) -> Tensor:
        high = state["high"]
        if is_narrower(rounded_to, raw.dtype):
            return inside(high - softplus(raw), rounded_to, high=high)
        return beside(high, -inf) - softplus(raw)


def _bound(value: Tensor, state: State, key: str, default: float) -> Tensor:
    return state[key] if key in state else value.new_full((), default)
