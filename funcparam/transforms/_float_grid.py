from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, log2
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import INTEGER, expect_argument, expect_choice
from funcparam.transforms.contract.base import State, Transform, largest
from funcparam.transforms.contract.precision import full_precision, widened
from funcparam.transforms.numerics.quantizing import (
    aligned,
    expect_groups,
    expect_whole_groups,
    grouped,
    held,
    shared_dims,
    straight_through,
)
from funcparam.transforms.numerics.slices import expect_slices


class _Format(NamedTuple):
    """Bits of the mantissa, the least exponent of normal numbers, and the largest number."""

    mantissa: int
    least: int
    top: float


_FORMATS: Mapping[str, _Format] = {
    "float8_e4m3fn": _Format(3, -6, 448.0),
    "float8_e5m2": _Format(2, -14, 57344.0),
    "float4_e2m1fn": _Format(1, 0, 6.0),
}


@final
@dataclass(frozen=True)
class FakeQuantizeFloat(Transform[Tensor]):
    r"""Weights rounded to the numbers of a small floating-point format, times a scale.

    $$W = s \, \operatorname{round}_f(\operatorname{clamp}(X / s, -t, t))$$

    where `t` is the largest number of the format `f`, and ties go to the even one. Raw has the
    shape of the value. State `{"scale"}` holds `s`: a scalar, with `dim` one for each index, or
    with `group_size` one for each group, `(..., n / group_size)`. Real dtypes. Init takes it from
    the largest |entry| that shares it: `amax / t`, or with `power_of_two` the power of 2 that takes
    `amax` into the last octave of the format; in half precision it is rounded up. A value on such a
    grid is kept; any other is rounded to its own. `update` takes it from raw, so that a range that
    grows in training is not clipped. The derivative is straight through: 1 to the end of the
    format's last octave, so that the largest entry may grow, and 0 beyond.

    `FakeQuantizeFloat("float4_e2m1fn", group_size=32, power_of_two=True)` is MXFP4.

    Args:
        format: `"float8_e4m3fn"`, `"float8_e5m2"` or `"float4_e2m1fn"`, as PyTorch names them.
        dim: the dimension that has its own scale for each index; None: one for the whole tensor.
        group_size: how many neighbours along the last dimension share a scale.
        power_of_two: whether scales are powers of 2, as in the MX formats.

    Raises:
        ValueError: `format` is none of these, or there are `dim` and `group_size`; at
            `fp.parametrize`, if the value is not real, has no dimension `dim` with more than one
            entry at each index, or `group_size` does not divide its last dimension.

    Example:
        >>> import torch
        >>> from funcparam.transforms import FakeQuantizeFloat
        >>> transform = FakeQuantizeFloat("float4_e2m1fn")
        >>> raw, state = transform.right_inverse(torch.tensor([6.0, -2.6, 0.7]))
        >>> transform.forward(raw, state)
        tensor([ 6.0000, -3.0000,  0.5000])

    Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433; Rouhani et al.,
    Microscaling data formats for deep learning, arXiv 2310.10537.
    """

    format: Literal["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
    dim: int | None = None
    group_size: int | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        expect_choice(self, "format", _FORMATS)
        expect_argument(self, "dim", INTEGER, optional=True)
        expect_choice(self, "power_of_two", (True, False))
        expect_groups(self)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        X = grouped(raw, self.group_size)
        (scale,) = aligned(self, X, state["scale"])
        top = _FORMATS[self.format].top
        steps = X / scale
        rounded = straight_through(self._rounded(steps.detach().clamp(-top, top)), steps)
        inside = steps.abs() < 2.0 ** (floor(log2(top)) + 1)
        return (scale * torch.where(inside, rounded, rounded.detach())).reshape(raw.shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        size = grouped(widened(value.detach()).abs(), self.group_size)
        dims, top = shared_dims(self, value), _FORMATS[self.format].top
        most = size.amax(dims) if size.numel() else size.sum(dims)
        least = torch.finfo(size.dtype).tiny
        if self.power_of_two:
            scale = (most.clamp_min(least).log2().floor() - floor(log2(top))).exp2()
        else:
            scale = most / top
        return value, {"scale": held(torch.where(most / top >= least, scale, 1), value.dtype)}

    def update(self, raw: Tensor, state: State) -> State:
        return self.right_inverse(raw.to(state["scale"].dtype))[1]

    def refresh(self, raw: Tensor, state: State) -> State:
        return self.update(raw, state)

    def project(self, value: Tensor, state: State) -> Tensor:
        return self.forward(value, state)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest distance of an entry from the grid in state, or its own without one."""
        if "scale" not in state:
            _, state = self.right_inverse(value)
        return largest(value - self.forward(value, state))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: it is constant almost everywhere"
        )

    def check(self, value: Tensor) -> None:
        expect_slices(self, value, self.dim)
        expect_whole_groups(self, value)

    def _rounded(self, x: Tensor) -> Tensor:
        """The nearest number of the format, by the size of the step at each."""
        mantissa, least, _ = _FORMATS[self.format]
        exponent = x.abs().clamp_min(2.0**least).log2().floor()
        step = (exponent - mantissa).exp2()
        return (x / step).round() * step
