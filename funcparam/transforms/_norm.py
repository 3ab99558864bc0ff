from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_dim, expect_real
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.fused_norm import can_fuse, fused_weight_norm
from funcparam.transforms.numerics.linalg import linalg


@final
@dataclass(frozen=True)
class WeightNorm(Transform[Mapping[str, Tensor]]):
    r"""Weight normalisation: the length and the direction of a weight, trained separately.

    $$W = g \, \frac{V}{\lVert V \rVert_2}$$

    Raw is `{"magnitude": g, "direction": V}`; `V` has the shape of the value, `g` has size 1 in
    every dimension that the norm runs over. Real dtypes. The right inverse is exact for every
    value whose norms are finite, slices of zeros included. The direction is the value itself where
    the squares of its norms are normal numbers (in float32, norms from 1e-19 to 1e19); beyond, it
    is divided by its largest entry.

    Written in composed operations: unlike `torch._weight_norm`, second-order gradients, `jvp`
    and `vmap` are right.

    Args:
        dim: the dimension that keeps a magnitude for each index; the norm runs over the others.
            Negative ones count from the end. None: one magnitude for the whole tensor.

    Raises:
        ValueError: at `fp.parametrize`, if the value has no dimension `dim` or is not real.

    Example:
        >>> import torch
        >>> from funcparam.transforms import WeightNorm
        >>> raw, state = WeightNorm(dim=0).right_inverse(torch.tensor([[3.0, 4.0]]))
        >>> raw["magnitude"]
        tensor([[5.]])
        >>> WeightNorm(dim=0).forward({**raw, "magnitude": torch.tensor([[10.0]])}, state)
        tensor([[6., 8.]])

    Source: Salimans and Kingma, Weight Normalization, arXiv 1602.07868, equation 2.
    """

    roles: ClassVar[Mapping[str, Role]] = {"magnitude": "magnitude", "direction": "direction"}

    dim: int | None = 0

    def __post_init__(self) -> None:
        expect_argument(self, "dim", INTEGER, optional=True)

    # The kernels compute in full precision by themselves, and on small weights asking costs a fifth
    # of the map.
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        magnitude, direction = raw["magnitude"], raw["direction"]
        dim, last = self.dim, direction.ndim - 1
        if dim is not None and last > 0 and can_fuse(magnitude, direction):
            dim = dim if dim >= 0 else dim + last + 1
            if dim in (0, last):
                return fused_weight_norm(magnitude, direction, dim)
        return self._composed(direction, {"magnitude": magnitude})

    def forward_stacked(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        direction = raw["direction"]
        if self.dim == 0 and direction.ndim > 2:  # rows are independent of each other
            rows = {name: tensor.flatten(0, 1) for name, tensor in raw.items()}
            return self.forward(rows, state).view_as(direction)
        return self._composed(direction, {"magnitude": raw["magnitude"]}, 1)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        scale = self._scale(value.detach())
        scaled = value / scale
        norm = self._norm(scaled)
        # Zeros have no direction; any will do, and one with a norm keeps gradients finite.
        direction = torch.where(norm == 0, torch.ones_like(value), scaled)
        return {"magnitude": norm * scale, "direction": direction}, {}

    @full_precision
    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        magnitude = raw["magnitude"]
        # of magnitude 0 the direction has to stay, and one of length 1 is as good as any
        length = torch.where(magnitude == 0, 1, magnitude.abs())
        direction = self.forward({**raw, "magnitude": length}, state)
        return {"magnitude": magnitude, "direction": direction}, state

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: every tensor is the product of a magnitude and a direction."""
        return value.new_zeros(())

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        if self.dim is not None:
            expect_dim(self, value, self.dim)

    @full_precision
    def _composed(self, direction: Tensor, other: Mapping[str, Tensor], stacked: int = 0) -> Tensor:
        """The value, in the dtype of the direction, which is of the weight's shape."""
        if direction.numel() == 0:  # its norm is 0
            return direction * other["magnitude"]
        return direction * (other["magnitude"] / self._norm(direction, stacked))

    def _scale(self, value: Tensor) -> Tensor:
        """1, or the largest entry where squares of the norm would vanish or overflow."""
        norm = self._norm(value)
        if value.numel() == 0:  # has no largest entry
            return torch.ones_like(norm)
        size = self._norm(value, order=inf)
        usual = (norm >= torch.finfo(value.dtype).tiny ** 0.5) & (norm < inf)
        return torch.where(usual | (size == 0), 1, size)

    def _norm(self, tensor: Tensor, stacked: int = 0, order: float = 2) -> Tensor:
        """The norm over all dimensions but `dim` and the first ones, of a stack."""
        own = tensor.ndim - stacked
        kept = own if self.dim is None else self.dim % own
        others = [stacked + i for i in range(own) if i != kept]
        if not others:  # vector_norm takes an empty dim for all dimensions
            return tensor.abs()
        norm: Tensor = linalg.vector_norm(tensor, order, dim=others, keepdim=True)
        return norm
