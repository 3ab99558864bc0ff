"""Values that rounding would put on a bound, kept strictly inside of it."""

from __future__ import annotations

from math import inf

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
    there = value.detach()
    least = None if low is None else _next(low.detach(), high, inf, rounded_to)
    most = None if high is None else _next(high.detach(), low, -inf, rounded_to)
    way = there.clamp(least, most) - there
    if low is None or high is None:
        way = way.nan_to_num(0.0)  # infinity stays where it is
    return value + way


def least_positive(dtype: torch.dtype, rounded_to: torch.finfo) -> float:
    """A positive number that is normal in `dtype` and not 0 in the narrower one."""
    return max(torch.finfo(dtype).tiny, rounded_to.tiny * rounded_to.eps)


def _next(bound: Tensor, other: Tensor | None, end: float, rounded_to: torch.finfo) -> Tensor:
    """The number next to `bound` on the side of the other one, or the one behind that."""
    if rounded_to.eps == torch.finfo(bound.dtype).eps:
        towards = torch.full_like(bound, end) if other is None else other.detach()
        return torch.nextafter(bound, towards)
    step = (bound.abs() * rounded_to.eps).clamp_min(least_positive(bound.dtype, rounded_to))
    return bound + step if end > 0 else bound - step
