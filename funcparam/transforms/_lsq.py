from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from funcparam.transforms._quantize import BITS, FakeQuantize
from funcparam.transforms.contract.arguments import INTEGER, expect_argument, expect_choice
from funcparam.transforms.contract.base import State, Transform
from funcparam.transforms.contract.precision import full_precision, widened
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.quantizing import expect_groups, grouped, held, shared_dims


@final
@dataclass(frozen=True)
class LSQ(Transform[Mapping[str, Tensor]]):
    r"""Learned step size quantization: rounded weights whose scale is trained with them.

    $$W = s \operatorname{clamp}(\operatorname{round}(X / s), -q, q), \qquad q = 2^{b - 1} - 1$$

    Raw is `{"weight": X, "scale": s}`, with scales as those of
    [`FakeQuantize`][funcparam.transforms.FakeQuantize], which is the same map with the scale in
    state. Real dtypes. The derivative is straight through as there, and that of the scale is
    multiplied by `1 / sqrt(N q)`, where `N` is the number of entries that share it: as large, for
    its size, as that of a weight.

    At init the scale is chosen by `init`: `"range"` takes the largest |entry| to the end of the
    range, so that a value on such a grid is kept; `"lsq"` is the paper's, `2 mean |W| / sqrt(q)`,
    which clips, and suits few bits better. Any value is rounded to the grid that it gets. A scale
    that training brings to 0 has no grid: values are NaN from then on. The paper's grid has one
    integer more, `-q - 1`; this one is symmetric.

    Args:
        bits: the width `b` of the integers, from 2 to 8.
        dim: the dimension that has its own scale for each index; None: one for the whole tensor.
        group_size: how many neighbours along the last dimension share a scale, with `dim=None`.
        init: `"range"` or `"lsq"`.

    Raises:
        ValueError: an argument is out of range; at `fp.parametrize`, if the value cannot be served,
            as by `FakeQuantize`.

    Example:
        >>> import torch
        >>> from funcparam.transforms import LSQ
        >>> raw, state = LSQ(bits=2).right_inverse(torch.tensor([-0.7, 0.2, 1.0]))
        >>> raw["scale"]
        tensor(1.)
        >>> LSQ(bits=2).forward({**raw, "scale": torch.tensor(0.5)}, state)
        tensor([-0.5000,  0.0000,  0.5000])

    Source: Esser et al., Learned step size quantization, arXiv 1902.08153, equations 1 to 3 and
    section 2.2 (the gradient's factor).
    """

    roles: ClassVar[Mapping[str, Role]] = {"scale": "magnitude"}

    bits: int = 8
    dim: int | None = None
    group_size: int | None = None
    init: Literal["range", "lsq"] = "range"

    def __post_init__(self) -> None:
        expect_argument(self, "bits", BITS)
        expect_argument(self, "dim", INTEGER, optional=True)
        expect_groups(self)
        expect_choice(self, "init", ("range", "lsq"))

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        X, scale = raw["weight"], raw["scale"]
        factor = 1 / sqrt(max(X.numel() / max(scale.numel(), 1) * self._levels, 1))
        slowed = scale.detach() + factor * (scale - scale.detach())
        return self._grid.forward(X, {"scale": slowed, "zero_point": torch.zeros_like(scale)})

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        _, grid = self._grid.right_inverse(value)
        scale = grid["scale"]
        if self.init == "lsq":
            size = grouped(widened(value.detach()).abs(), self.group_size)
            mean = size.mean(shared_dims(self, value))
            start = held(2 * mean / sqrt(self._levels), value.dtype)
            scale = torch.where(mean > 0, start, scale)
        return {"weight": value, "scale": scale}, {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """NaN: the grid is trained, and which one a value is on is not measured."""
        return value.new_full((), torch.nan)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: it is constant almost everywhere in the weight"
        )

    def check(self, value: Tensor) -> None:
        self._grid.check(value)

    @property
    def _grid(self) -> FakeQuantize:
        return FakeQuantize(self.bits, dim=self.dim, group_size=self.group_size)

    @property
    def _levels(self) -> int:
        return 2 ** (self.bits - 1) - 1
