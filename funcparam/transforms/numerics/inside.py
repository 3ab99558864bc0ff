"""Values that rounding would put on a bound, kept strictly inside of it."""

from __future__ import annotations

import torch
from torch import Tensor


def inside(
    value: Tensor, rounded_to: torch.finfo, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """`value`, and where it is closer to a bound than its dtype can tell the nearest that is not.

    The derivative is that of `value`: a weight that has come there can leave again. It is to be
    rounded to a dtype that may be narrower than its own. Where nothing lies between the bounds the
    value is on the upper one's side.
    """
    moved = value.detach()
    if low is not None:
        moved = torch.maximum(moved, low + _step(low, rounded_to))
    if high is not None:
        moved = torch.minimum(moved, high - _step(high, rounded_to))
    moved = moved.detach()
    return torch.where(value == moved, value, moved + (value - value.detach()))


def least_positive(dtype: torch.dtype, rounded_to: torch.finfo) -> float:
    """A positive number that is normal in `dtype` and not 0 in the narrower one."""
    return max(torch.finfo(dtype).tiny, rounded_to.tiny * rounded_to.eps)


def _step(bound: Tensor, rounded_to: torch.finfo) -> Tensor:
    """At least one step of the dtype next to `bound`, and at most two."""
    return (bound.abs() * rounded_to.eps).clamp_min(least_positive(bound.dtype, rounded_to))
