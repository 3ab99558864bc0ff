from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import INTEGER, Kind, expect_argument, expect_choice
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
from funcparam.transforms.numerics.slices import expect_slices, other_dims

_THRESHOLD = Kind("a number from 0 to below 1", (int, float), lambda x: 0 <= x < 1)
BITS = Kind("an integer from 2 to 8", (int,), lambda n: 2 <= n <= 8)


@final
@dataclass(frozen=True)
class Ternary(Transform[Tensor]):
    r"""Weights of three levels: minus a length, zero, and plus that length.

    $$W_i = \alpha \operatorname{sign}(X_i) [\lvert X_i \rvert > \Delta], \qquad
    \Delta = t \operatorname{mean} \lvert X \rvert$$

    where `alpha` is the mean of `|X|`, with `scale="kept"` over the entries that keep a sign, and
    with `scale="absmean"` over all of them. `Ternary(0.5, scale="absmean")` is BitNet b1.58's
    `alpha clip(round(X / alpha), -1, 1)`.

    Raw has the shape of the value. Real dtypes. A value of such levels is kept, with
    `scale="absmean"` by a raw that is larger where it is not 0; any other goes to those that the
    formula gives for it.

    The derivative is straight through, that of `W = X`: the true one is 0 almost everywhere.

    Args:
        threshold: `t`, at least 0 and below 1. With 0 every entry but exact zeros keeps a sign.
        dim: the dimension that has its own levels for each index; None: one for the whole
            tensor, as in the papers. Negative ones count from the end.
        scale: `"kept"` or `"absmean"`.

    Raises:
        ValueError: `threshold` is not in [0, 1) or `scale` is none of the two; at `fp.parametrize`,
            if the value is not real or has no dimension `dim` with more than one entry at each
            index.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Ternary
        >>> Ternary().forward(torch.tensor([-3.0, 0.1, 1.0]), {})
        tensor([-2.,  0.,  2.])

    Source: Li et al., Ternary weight networks, arXiv 1605.04711, equations 5 and 6; Ma et al., The
    era of 1-bit LLMs, arXiv 2402.17764, equations 1 to 3 (`"absmean"`).
    """

    threshold: float = 0.7
    dim: int | None = None
    scale: Literal["kept", "absmean"] = "kept"

    def __post_init__(self) -> None:
        expect_argument(self, "threshold", _THRESHOLD)
        expect_argument(self, "dim", INTEGER, optional=True)
        expect_choice(self, "scale", ("kept", "absmean"))

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return straight_through(self._levels(raw), raw)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        if self.scale == "kept" or not value.numel():
            return value, {}
        # levels, which a mean over all entries would shorten
        dims, size = other_dims(value, self.dim), value.detach().abs()
        top = size.amax(dims, keepdim=True)
        level = (size == 0) | ((size - top).abs() <= 8 * torch.finfo(size.dtype).eps * top)
        stretch = top / torch.where(top > 0, size.mean(dims, keepdim=True), 1)
        every = level.all(dim=tuple(dims), keepdim=True) if dims else level
        return value * torch.where(every & (top > 0), stretch, 1), {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest distance of an entry from its level."""
        return largest(value - self._levels(self.right_inverse(value)[0]))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(_piecewise_constant(self))

    def check(self, value: Tensor) -> None:
        expect_slices(self, value, self.dim)

    def _levels(self, X: Tensor) -> Tensor:
        dims = other_dims(X, self.dim)
        size = X.abs()
        mean = size.mean(dims, keepdim=True)
        above = size > self.threshold * mean
        if self.scale == "absmean":
            return torch.where(above, mean * X.sign(), 0)
        total = torch.where(above, size, 0).sum(dims, keepdim=True)
        alpha = total / above.sum(dims, keepdim=True).clamp_min(1)
        return torch.where(above, alpha * X.sign(), 0)


@final
@dataclass(frozen=True)
class FakeQuantize(Transform[Tensor]):
    r"""Weights rounded to the levels of an integer format, for training that knows of it.

    $$W = s \left(\operatorname{clamp}(\operatorname{round}(X / s) + z, q_{\min}, q_{\max})
    - z\right)$$

    Raw has the shape of the value. State `{"scale", "zero_point"}` holds `s` and `z` as tensors
    of the value's dtype: scalars, with `dim` one for each index, or with `group_size` one for each
    group, `(..., n / group_size)`. Real dtypes. Init takes them from the range of the value,
    and in half precision rounds the scale up:

    | scheme | integers, with `h = 2^(bits - 1)` | `s` | `z` |
    |---|---|---|---|
    | `"narrow"` | `1 - h ... h - 1` | largest entry `/ (h - 1)` | 0 |
    | `"full"` | `-h ... h - 1` | largest entry `/ (h - 1/2)` | 0 |
    | `"affine"` | `0 ... 2 h - 1` | range `/ (2 h - 1)` | `-round(least / s)` |

    The largest entry is that in size; the range is the least one that has all entries and 0 in it.
    `"full"` and `"affine"` are those of PyTorch's min-max observers, symmetric and affine, and
    `"full"` what its default weight quantizers use. `"narrow"`, which is TensorFlow's, has steps
    larger by 1/254 for 8 bits, and keeps the largest entry, which `"full"` clips by half a step
    where it is positive. On `"narrow"` and `"affine"` a value on such a grid that reaches its ends
    is kept; any other is rounded to its own. On `"full"` only zeros are: any other value gets a new
    scale.

    `update` takes them from the range of raw, so that a range that grows in training is not
    clipped; a scale of one's own stays where nothing updates. In a chain, from what comes before.

    The derivative is straight through: round counts as the identity. So it is 1 with respect to
    raw inside the range and 0 outside, as `torch.fake_quantize_per_tensor_affine` has it. With
    respect to the scale it is that of learned step size quantization; the scale is state, though,
    which no optimizer of raw trains.

    Args:
        bits: the width of the integers, from 2 to 8, so that half precision counts to them.
        scheme: `"narrow"`, `"full"` or `"affine"`.
        dim: the dimension that has its own scale for each index, 0 for PyTorch's per-channel
            scheme; None: one for the whole tensor. Negative ones count from the end.
        group_size: how many neighbours along the last dimension, the inputs of a Linear, share a
            scale; 32 and 128 are usual for 4 bits, where `"full"` and `"affine"` are torchao's
            symmetric and asymmetric int4. None: there are no groups.

    Raises:
        ValueError: `bits` is not from 2 to 8, `scheme` is none of the three, or there are `dim` and
            `group_size`; at `fp.parametrize`, if the value is not real, has no dimension `dim` with
            more than one entry at each index, or `group_size` does not divide its last dimension.

    Example:
        >>> import torch
        >>> from funcparam.transforms import FakeQuantize
        >>> raw, state = FakeQuantize(bits=2).right_inverse(torch.tensor([-0.7, 0.2, 1.0]))
        >>> FakeQuantize(bits=2).forward(raw, state)
        tensor([-1.,  0.,  1.])

    Source: Jacob et al., arXiv 1712.05877, equation 12; Esser et al., arXiv 1902.08153, equation
    3 (the scale's derivative).
    """

    bits: int = 8
    scheme: Literal["narrow", "full", "affine"] = "narrow"
    dim: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        expect_argument(self, "bits", BITS)
        expect_choice(self, "scheme", ("narrow", "full", "affine"))
        expect_argument(self, "dim", INTEGER, optional=True)
        expect_groups(self)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        X = grouped(raw, self.group_size)
        scale, zero_point = aligned(self, X, state["scale"], state["zero_point"])
        steps = X / scale
        rounded = straight_through(steps.round(), steps)
        integers, (low, high) = rounded + zero_point, self._range()
        # the ends are inside; clamp's own derivative there is 1 or 0 by the version of PyTorch
        inside = (integers >= low) & (integers <= high)
        levels = torch.where(inside, integers, integers.detach().clamp(low, high))
        return (scale * (levels - zero_point)).reshape(raw.shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        low, high = self._range()
        X, dims = grouped(widened(value.detach()), self.group_size), shared_dims(self, value)
        if not X.numel():
            ends = X.sum(dims), X.sum(dims)
        else:
            ends = X.amin(dims).clamp_max(0), X.amax(dims).clamp_min(0)
        largest_entry = torch.maximum(-ends[0], ends[1])
        match self.scheme:
            case "narrow":
                scale = largest_entry / high
            case "full":
                scale = largest_entry / ((high - low) / 2)
            case _:
                scale = (ends[1] - ends[0]) / (high - low)
        # zeros are on every grid
        scale = held(torch.where(scale >= torch.finfo(scale.dtype).tiny, scale, 1), value.dtype)
        zero_point = torch.zeros_like(scale)
        if self.scheme == "affine":
            zero_point = -(ends[0] / scale.to(X.dtype)).round().to(value.dtype)
        return value, {"scale": scale, "zero_point": zero_point}

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
        raise NotImplementedError(_piecewise_constant(self))

    def check(self, value: Tensor) -> None:
        expect_slices(self, value, self.dim)
        expect_whole_groups(self, value)

    def _range(self) -> tuple[int, int]:
        if self.scheme == "affine":
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return (1 - half if self.scheme == "narrow" else -half), half - 1


def _piecewise_constant(transform: Transform[Tensor]) -> str:
    return f"{transform!r} has no log_abs_det_jacobian: it is constant almost everywhere"
