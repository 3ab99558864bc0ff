"""Values that rounding would put on a bound, kept strictly inside of it."""

from __future__ import annotations

import torch
from torch import Tensor


def beside(bound: Tensor, towards: Tensor | float) -> Tensor:
    """The number next to a bound, with the derivative of the bound.

    A map that starts from it instead of the bound is off by no more than by rounding, and never
    on the bound.
    """
    there = bound.detach()
    end = towards.detach() if isinstance(towards, Tensor) else torch.full_like(there, towards)
    return bound + (torch.nextafter(there, end) - there)


def inside(
    value: Tensor, rounded_to: torch.finfo, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """`value`, and where a narrower dtype would round it to a bound the nearest that it does not.

    The derivative is that of `value`: a weight that has come there can leave again. Where nothing
    lies between the bounds the value is on the upper one's side.
    """
    there = value.detach()
    least = None if low is None else low.detach() + step(low.detach(), rounded_to)
    most = None if high is None else high.detach() - step(high.detach(), rounded_to)
    way = there.clamp(least, most) - there
    if low is None or high is None:
        way = way.nan_to_num(0.0)  # infinity stays where it is
    return value + way


def step(bound: Tensor, rounded_to: torch.finfo) -> Tensor:
    """How far from a number it takes to be rounded to the next one of a narrower dtype.

    That is a little more than half of the way there, and up to all of it.
    """
    half = 0.51 * rounded_to.eps * bound.abs()
    return half.clamp_min(least_positive(bound.dtype, rounded_to))


def is_narrower(rounded_to: torch.finfo, dtype: torch.dtype) -> bool:
    """Whether values of a dtype are to be rounded to another one."""
    return rounded_to.eps > torch.finfo(dtype).eps


def least_positive(dtype: torch.dtype, rounded_to: torch.finfo) -> float:
    """A positive number that is normal in `dtype` and not 0 in the narrower one."""
    return max(torch.finfo(dtype).tiny, rounded_to.tiny * rounded_to.eps)
