from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms._orthogonal import Orthogonal
from funcparam.transforms.contract.base import State, Transform, expect_matrix
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.frames import lifted, lifted_by_tilt, moved, tilted
from funcparam.transforms.numerics.karcher import karcher_mean
from funcparam.transforms.numerics.orthogonal_maps import q_factor
from funcparam.transforms.numerics.polar import nearest_orthogonal, orthogonal_tangent


@final
@dataclass(frozen=True)
class Stiefel(Transform[Tensor]):
    r"""Matrices with orthonormal columns (tall and square) or rows (wide), for thin matrices.

    $$W = (2 Q Q^H - I) \, B \, C(A), \qquad C(A) = (I - A/2)^{-1} (I + A/2)$$

    `B` is a base point of the value's shape. Raw `X`, of that shape too, is a direction at `B`:
    `A` is the skew-Hermitian part of `B^H X` and turns the columns within their span;
    `K = X - B B^H X` tilts the span, by the reflection of `B` in the span of `Q`, the Q factor of
    `B + K / 2`. To first order `W` is `B` plus the projection of `X` on the tangent space, so the
    gradient at raw 0 is the Riemannian one. A wide raw is transposed first, and the result back.

    The values are those of [`Orthogonal`][funcparam.transforms.Orthogonal] with another
    parametrization. For `k` columns of length `n` a step takes about `n k^2` operations and state
    `{"base"}` `n k` numbers, where `Orthogonal` takes `n^3` and `n^2`: this is the one for thin
    matrices. Of a square matrix it is `B C(A)`.

    Real and complex. A value of this kind is kept, any other goes to its Q factor. `rebase` moves
    the base point. The columns are orthonormal to rounding at any raw; in float32 for entries up
    to about 1e4.

    Raises:
        ValueError: at `fp.parametrize`, if the value has fewer than two dimensions.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Stiefel
        >>> raw, state = Stiefel().right_inverse(torch.eye(100, 2))
        >>> W = Stiefel().forward(raw + torch.ones(100, 2), state)
        >>> torch.allclose(W.mT @ W, torch.eye(2), atol=1e-6)
        True

    Source: Edelman, Arias and Smith, The geometry of algorithms with orthogonality constraints,
    SIAM J. Matrix Anal. Appl. 20 (1998); Wen and Yin, Mathematical Programming 142 (2013) (a
    Cayley transform in thin matrices).
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "relative"}

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return _of_tall(moved, state["base"], raw)

    def forward_stacked(self, raw: Tensor, state: State) -> Tensor:
        return self.forward(raw, state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return torch.zeros_like(value), {"base": _nearby_frame(value)}

    @full_precision
    def refresh(self, raw: Tensor, state: State) -> State:
        return {"base": nearest_orthogonal(state["base"])}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.right_inverse(self.forward(raw, state))

    @full_precision
    def transport(
        self, raw: Tensor, state: State, new_raw: Tensor, new_state: State, covector: Tensor
    ) -> Tensor:
        """The gradient by a raw of 0 is the tangent part of that by the value."""
        found = _of_tall(lifted, state["base"], raw, covector)
        if found is None:
            return super().transport(raw, state, new_raw, new_state, covector)
        return orthogonal_tangent(new_state["base"], found)

    @full_precision
    def project(self, value: Tensor, state: State) -> Tensor:
        """The nearest such matrix, the polar factor."""
        return nearest_orthogonal(value)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return orthogonal_tangent(value, vector)

    def karcher_mean(self, values: Tensor, weights: Tensor) -> Tensor:
        return karcher_mean(values, weights)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W^H W - I| of the shorter side."""
        return Orthogonal().violation(value, state)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)


@final
@dataclass(frozen=True)
class Grassmann(Transform[Tensor]):
    r"""Subspaces: an orthonormal frame that tilts and does not turn within its span.

    $$W = (2 Q Q^H - I) \, B$$

    for tall matrices, whose columns span the subspace; the rows of a wide one do. `B` is a base
    point of the value's shape, state `{"base"}`. Raw `X` has that shape too, and its part
    `K = X - B B^H X` counts: `Q` is the Q factor of `B + K / 2`. To first order `W` is `B + K`:
    the frame moves at right angles to itself. It is the Cayley transform of the skew matrix with
    blocks 0, `-K^H`, `K`, 0 in the basis of `B` and its complement. Any subspace can be reached.

    A point of the manifold is the subspace, and `W W^H` the projector on it. Each has many frames;
    the loss should not depend on which. The value here is the frame that the tilt of `B` gives.
    Likewise the part of raw in the span of `B` changes nothing and gets no gradient.

    Real and complex. A value with orthonormal columns is kept, that very frame; any other goes to
    its Q factor, which has the same span. `rebase` moves the base point.

    Raises:
        ValueError: at `fp.parametrize`, if the value has fewer than two dimensions, or is square:
            there is one subspace of full dimension, and nothing to train.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Grassmann
        >>> raw, state = Grassmann().right_inverse(torch.eye(3, 1))
        >>> W = Grassmann().forward(raw + torch.tensor([[7.0], [2.0], [0.0]]), state)
        >>> W.round(decimals=3)
        tensor([[0.],
                [1.],
                [0.]])

    Source: Edelman, Arias and Smith, The geometry of algorithms with orthogonality constraints,
    SIAM J. Matrix Anal. Appl. 20 (1998), section 2.5; geotorch's `Grassmannian` with
    `triv="cayley"` has the same values.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "relative"}

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return _of_tall(tilted, state["base"], raw)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return torch.zeros_like(value), {"base": _nearby_frame(value)}

    @full_precision
    def refresh(self, raw: Tensor, state: State) -> State:
        return {"base": nearest_orthogonal(state["base"])}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.right_inverse(self.forward(raw, state))

    @full_precision
    def transport(
        self, raw: Tensor, state: State, new_raw: Tensor, new_state: State, covector: Tensor
    ) -> Tensor:
        """A gradient of a loss of the subspace is at right angles to the frame."""
        found = _of_tall(_lifted_subspace, state["base"], raw, covector)
        if found is None:
            return super().transport(raw, state, new_raw, new_state, covector)
        return _of_tall(_across, new_state["base"], found)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W^H W - I| of the shorter side."""
        return Orthogonal().violation(value, state)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        if value.shape[-2] == value.shape[-1]:
            raise ValueError(
                f"{self!r} expects a tall or wide matrix, whose columns or rows span less than the"
                f" whole space; got shape {tuple(value.shape)}"
            )


def _lifted_subspace(base: Tensor, X: Tensor, covector: Tensor) -> Tensor | None:
    return lifted_by_tilt(base, X, covector, torch.zeros_like(base.mH @ base))


def _across(base: Tensor, X: Tensor) -> Tensor:
    return X - base @ (base.mH @ X)


def _of_tall(function: Callable[..., Any], first: Tensor, *rest: Tensor) -> Any:
    """What a function of tall matrices makes of wide ones, too; None if it makes none."""
    if not _is_wide(first):
        return function(first, *rest)
    found = function(first.mT, *(tensor.mT for tensor in rest))
    return found if found is None else found.mT


def _is_wide(tensor: Tensor) -> bool:
    return tensor.shape[-2] < tensor.shape[-1]


def _nearby_frame(value: Tensor) -> Tensor:
    return _of_tall(q_factor, value)
