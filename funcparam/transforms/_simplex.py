from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from funcparam.transforms.contract.arguments import expect_choice
from funcparam.transforms.contract.base import State, Transform, expect_range, expect_real, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role


@final
@dataclass(frozen=True)
class Simplex(Transform[Tensor]):
    r"""Positive entries that sum to 1 over the last dimension.

    * `"softmax"`: $W = \exp(X) / \sum \exp(X)$. Raw has the shape of the value, `(..., n)`; a
      number added to all of it changes nothing, so there is no log-determinant.
    * `"stick_breaking"`: entry k takes the share $z_k$ of what the entries before it left,

        $$W_k = z_k \prod_{j<k} (1 - z_j), \qquad z_k = \sigma(X_k - \log(n - k)),$$

        and the last one the rest. Raw is `(..., n - 1)`, one less than the value, and 0 is the
        middle of the simplex. The log-determinant is over the first n - 1 entries of the value:
        the sum of $\log(1 - z_k) + \log W_k$. It mixes coordinates, so softmax trains better.

    Real dtypes. An entry below the least number is 0. A positive value that sums to 1 is kept;
    another positive one goes to `value / value.sum(-1)`.

    Args:
        map: `"softmax"` or `"stick_breaking"`.

    Raises:
        ValueError: `map` is neither; at `fp.parametrize`, if the last dimension is missing or
            empty; at init, if an entry is not positive.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Simplex
        >>> raw, state = Simplex().right_inverse(torch.tensor([1.0, 1.0, 2.0]))
        >>> Simplex().forward(raw, state)
        tensor([0.2500, 0.2500, 0.5000])
        >>> Simplex("stick_breaking").forward(torch.zeros(3), {})
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Source: Stan reference manual, unit simplex; `SoftmaxTransform` and `StickBreakingTransform`
    of `torch.distributions.transforms`.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    map: Literal["softmax", "stick_breaking"] = "softmax"

    def __post_init__(self) -> None:
        expect_choice(self, "map", ("softmax", "stick_breaking"))

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        if self.map == "softmax":
            return raw.softmax(-1)
        return _log_sticks(raw).exp()

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        expect_range(self, value, value > 0, "to be positive")
        if self.map == "softmax":
            return value.log(), {}
        # What is left after each entry, added up from the end: 1 - cumsum would cancel.
        left = value.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return value[..., :-1].log() - left.log() + _log_left(left), {}

    @full_precision
    def project(self, value: Tensor, state: State) -> Tensor:
        """The nearest point, but for zeros, which become the smallest normal number.

        Source: Duchi et al., Efficient projections onto the l1-ball (2008), figure 1.
        """
        down = value.sort(dim=-1, descending=True).values
        counts = torch.arange(1, value.shape[-1] + 1, dtype=value.dtype, device=value.device)
        levels = (down.cumsum(-1) - 1) / counts
        last = (down > levels).sum(-1, keepdim=True).sub(1).clamp_min(0)  # of NaN none is
        inside = (value - levels.gather(-1, last)).clamp_min(torch.finfo(value.dtype).tiny)
        return inside / inside.sum(-1, keepdim=True)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector - vector.mean(-1, keepdim=True)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |sum - 1|, or how far the least entry is below 0 if that is more."""
        off = largest(value.sum(-1) - 1)
        return torch.maximum(off, largest((-value).clamp_min(0)))

    @full_precision
    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        if self.map == "softmax":
            raise NotImplementedError(
                f"{self!r} has no log_abs_det_jacobian: a number added to all of raw changes"
                " nothing, so the Jacobian is singular. Simplex('stick_breaking') has one"
            )
        return (logsigmoid(_log_left(raw) - raw) + _log_sticks(raw)[..., :-1]).sum()

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return None

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        last = torch.arange(value.shape[-1], device=value.device) == value.shape[-1] - 1
        return ~last.expand(value.shape)

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        if value.ndim == 0 or value.shape[-1] == 0:
            raise ValueError(
                f"{self!r} expects at least one entry in the last dimension; got shape"
                f" {tuple(value.shape)}"
            )


def _log_left(raw: Tensor) -> Tensor:
    """The logarithm of how many entries come after each: log(n - 1), ..., log(1)."""
    count = raw.shape[-1]
    return torch.arange(count, 0, -1, dtype=raw.dtype, device=raw.device).log()


def _log_sticks(raw: Tensor) -> Tensor:
    """The logarithm of the value. Sums of logarithms have finite gradients where products end."""
    logit = raw - _log_left(raw)
    left = logsigmoid(-logit).cumsum(-1)
    return pad(logsigmoid(logit), (0, 1)) + pad(left, (1, 0))
