from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from funcparam.transforms._base import State, Transform, expect_all, expect_real, largest
from funcparam.transforms._precision import full_precision

# softplus returns its argument above this, which has to be exact in float64 too
_LINEAR_ABOVE = 50.0


@final
@dataclass(frozen=True)
class Positive(Transform[Tensor]):
    r"""Positive entries: `W = softplus(X) = log(1 + exp(X))`.

    Raw has the shape of the value. Real dtypes. The right inverse is exact:
    `X = W + log(1 - exp(-W))`. Log-determinant: `sum(log(sigmoid(X)))`.

    Raises:
        ValueError: at init, if an entry is not positive.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Positive
        >>> raw, state = Positive().right_inverse(torch.tensor([0.5, 2.0]))
        >>> Positive().forward(raw, state)
        tensor([0.5000, 2.0000])

    Source: `torch.distributions.transforms.SoftplusTransform`.
    """

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return softplus(raw, threshold=_LINEAR_ABOVE)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        expect_all(self, value > 0, "expects every entry to be positive; clamp the value first")
        return value + torch.log(-torch.expm1(-value)), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the least entry is below 0."""
        return largest((-value).clamp_min(0))

    @full_precision
    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        return logsigmoid(raw).sum()

    def check(self, value: Tensor) -> None:
        expect_real(self, value)


@final
@dataclass(frozen=True)
class Interval(Transform[Tensor]):
    r"""Entries strictly between two bounds: `W = low + (high - low) sigmoid(X)`.

    Raw has the shape of the value. State `{"low", "high"}` holds the bounds as scalars, so that
    they can be moved or swept with `vmap`; `low` and `high` here are what init writes there.
    Real dtypes. The right inverse is exact, the logit of `(W - low) / (high - low)`.
    Log-determinant: `sum(log(high - low) + log sigmoid(X) + log sigmoid(-X))`.

    Args:
        low: the lower bound, finite.
        high: the upper bound, finite, above `low`.

    Raises:
        ValueError: the bounds are not finite or not in order; at init, if an entry is not
            strictly between them.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Interval
        >>> raw, state = Interval(-1, 1).right_inverse(torch.tensor([0.5]))
        >>> Interval(-1, 1).forward(raw, state)
        tensor([0.5000])
        >>> Interval(-1, 1).forward(raw, {**state, "high": torch.tensor(3.0)})
        tensor([2.0000])

    Source: Stan reference manual, lower and upper bounded scalar.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (isfinite(self.low) and isfinite(self.high) and self.low < self.high):
            raise ValueError(
                "Interval expects finite bounds with low < high;"
                f" got low={self.low}, high={self.high}"
            )

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return state["low"] + (state["high"] - state["low"]) * raw.sigmoid()

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        inside = (value > self.low) & (value < self.high)
        expect_all(
            self, inside, "expects every entry strictly between its bounds; clamp the value first"
        )
        raw = torch.logit((value - self.low) / (self.high - self.low))
        return raw, {
            "low": value.new_full((), self.low),
            "high": value.new_full((), self.high),
        }

    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the farthest entry is outside; the bounds in state count if they are given."""
        low, high = state.get("low", self.low), state.get("high", self.high)
        return largest(torch.maximum(low - value, value - high).clamp_min(0))

    @full_precision
    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        width = torch.log(state["high"] - state["low"])
        return (width + logsigmoid(raw) + logsigmoid(-raw)).sum()

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
