from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import (
    INTEGER,
    POSITIVE_NUMBER,
    expect_argument,
    keep_integers,
)
from funcparam.transforms.contract.base import State, Transform, expect_all, expect_dim, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.norms import directions, norms


@final
@dataclass(frozen=True)
class UnitNorm(Transform[Tensor]):
    r"""Vectors of a given length along some dimensions: `W = r X / |X|`.

    Raw has the shape of the value and starts as the value. Real and complex. A value of this
    kind is kept; any other goes to the nearest one, `r value / |value|`. Gradients are orthogonal
    to raw and shrink as `1 / |X|`, which grows with every step; `rebase` makes the value raw, and
    so brings it back to `r`. Where raw is zero the value is zero.

    Args:
        dim: the dimensions along which the length is taken: an integer, several, or None for all of
            them. -1: rows of a matrix; 0: its columns; `(1, 2, 3)`: filters of a convolution.
        radius: the length `r`, positive. None: each vector keeps the length that it has at init,
            in state `{"radius"}`, of size 1 along `dim`.

    Raises:
        ValueError: `radius` is not positive; at `fp.parametrize`, if the value has no dimension
            `dim`, twice the same, or no entry along it; at init, if a vector is zero.

    Example:
        >>> import torch
        >>> from funcparam.transforms import UnitNorm
        >>> UnitNorm().forward(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), {})
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])

    Source: Absil, Mahony and Sepulchre, Optimization Algorithms on Matrix Manifolds (2008),
    section 4.1 (the projective retraction of the sphere). With `rebase` after each step: Loshchilov
    et al., nGPT, arXiv 2410.01131; Karras et al., EDM2, arXiv 2312.02696 (`dim=(1, 2, 3)`);
    Hyperball, arXiv 2606.16899 (`dim=None, radius=None`).
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "direction"}

    dim: int | tuple[int, ...] | None = -1
    radius: float | None = 1.0

    def __post_init__(self) -> None:
        if self.dim is None or isinstance(self.dim, int):
            expect_argument(self, "dim", INTEGER, optional=True)
        else:
            keep_integers(self, "dim")
        expect_argument(self, "radius", POSITIVE_NUMBER, optional=True)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        direction = directions(raw, self._dims(raw))
        if self.radius == 1:
            return direction
        return direction * (state["radius"] if self.radius is None else self.radius)

    def forward_stacked(self, raw: Tensor, state: State) -> Tensor:
        if self.dim is not None and max(self._dims(raw)) < 0:
            return self.forward(raw, state)
        return super().forward_stacked(raw, state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        norm = norms(value, self._dims(value))
        expect_all(
            self,
            norm > 0,
            f"expects no vector along dim {self.dim} to be zero: it has no direction",
        )
        return value, {"radius": norm} if self.radius is None else {}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.forward(raw, state), state

    @full_precision
    def transport(
        self, raw: Tensor, state: State, new_raw: Tensor, new_state: State, covector: Tensor
    ) -> Tensor:
        """Gradients are along the sphere, and as long as raw is short."""
        dims = self._dims(raw)
        length, radius = norms(raw, dims), state["radius"] if self.radius is None else self.radius
        moved = covector * torch.where(length == 0, 1, length / radius)
        along = (new_raw.conj() * moved).real.sum(dims, keepdim=True) / radius**2
        return torch.addcmul(moved, new_raw, along.to(new_raw.dtype), value=-1)

    def project(self, value: Tensor, state: State) -> Tensor:
        return self.forward(value, state)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        dims = self._dims(value)
        normal = directions(value, dims)
        along = (normal.conj() * vector).real.sum(dims, keepdim=True)
        return torch.addcmul(vector, normal, along.to(normal.dtype), value=-1)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest ||W| - r|. A radius in state is the constraint."""
        if self.radius is None and "radius" not in state:
            raise ValueError(f"{self!r} expects state with a 'radius', which is its constraint")
        radius = state["radius"] if self.radius is None else self.radius
        return largest(norms(value, self._dims(value)) - radius)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the length of raw is lost, so its Jacobian"
            " is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        dims = self._dims(value)
        for dim in dims:
            expect_dim(self, value, dim)
        if len({dim % value.ndim for dim in dims}) < len(dims):
            raise ValueError(
                f"{self!r} expects each dimension once; got shape {tuple(value.shape)}"
            )
        if any(value.shape[dim] == 0 for dim in dims):
            raise ValueError(
                f"{self!r} expects at least one entry along dim {self.dim};"
                f" got shape {tuple(value.shape)}"
            )

    def _dims(self, tensor: Tensor) -> tuple[int, ...]:
        if self.dim is None:
            return tuple(range(tensor.ndim))
        return (self.dim,) if isinstance(self.dim, int) else self.dim
