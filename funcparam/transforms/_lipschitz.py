from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms._base import State, Transform, expect_matrix, expect_real, largest
from funcparam.transforms._linalg import linalg
from funcparam.transforms._precision import full_precision
from funcparam.transforms._softplus import inverse_softplus, softplus


@final
@dataclass(frozen=True)
class LInfLipschitz(Transform[Mapping[str, Tensor]]):
    r"""Rows whose 1-norms stay below a trained bound: the layer's Lipschitz constant.

    $$W_i = X_i \, \min\left(1, \frac{\operatorname{softplus}(c)}{\lVert X_i \rVert_1}\right)$$

    `softplus(c)` bounds the layer's Lipschitz constant in the maximum norm, of a convolution as
    well. For a value of shape `(m, ...)`, whose rows are `value.flatten(1)`, raw is
    `{"weight": X, "bound": c}` with a scalar `c`: penalise `softplus(raw["bound"])` to make the
    network smooth. Real dtypes. Every value is kept: init takes the largest row's 1-norm for the
    bound.

    Raises:
        ValueError: at `fp.parametrize`, if the value has fewer than two dimensions or is not
            real.

    Example:
        >>> import torch
        >>> from funcparam.transforms import LInfLipschitz
        >>> raw = {"weight": torch.tensor([[9.0, -1.0], [1.0, 0.0]]), "bound": torch.tensor(100.0)}
        >>> LInfLipschitz().forward({**raw, "weight": 20 * raw["weight"]}, {})
        tensor([[ 90., -10.],
                [ 20.,   0.]])

    Source: Liu et al., Learning smooth neural functions via Lipschitz regularization,
    arXiv 2202.08345, section 4.
    """

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        X = raw["weight"]
        bound = softplus(raw["bound"]).clamp_min(torch.finfo(X.dtype).tiny)
        sums = X.flatten(1).abs().sum(1)
        # min(1, bound / sums) without a division by 0
        scale = bound / torch.maximum(sums, bound)
        return X * scale.reshape(-1, *[1] * (X.ndim - 1))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        bound = largest(value.flatten(1).abs().sum(1))
        # of a weight of zeros the bound is positive as well, or its gradient would be 0
        bound = inverse_softplus(bound.clamp_min(torch.finfo(value.dtype).eps))
        return {"weight": value, "bound": bound}, {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: the bound is trained, so every value has one."""
        return value.new_zeros(())

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_matrix(self, value)


# the columns of a matrix to the power 2^12 are its Perron vector, if the gap is one percent
_SQUARINGS = 12


@final
@dataclass(frozen=True)
class AOL(Transform[Tensor]):
    r"""Almost orthogonal matrices: spectral norm at most 1, by a scale for each input.

    $$W = X \operatorname{diag}\left(\sum\nolimits_j \lvert X^T X \rvert_{ij}\right)^{-1/2}$$

    Raw has the shape of the value, a real matrix. Columns of zeros stay 0. The image is smaller
    than the matrices of spectral norm at most 1: it is those `W` with `|W^T W| d = d` for a
    positive `d`, orthonormal columns among them. Such a value is kept, with `W diag(d)` as raw.
    Any other value, of spectral norm below 1 too, is divided by the root of the largest
    eigenvalue of `|W^T W|`, where its eigenvector `d` is positive; columns that have no share in
    it get a norm of their own.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not a real matrix. The bound does not
            hold for a convolution with this kernel.

    Example:
        >>> import torch
        >>> from funcparam.transforms import AOL
        >>> AOL().forward(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), {})
        tensor([[1., 0.],
                [0., 1.]])

    Source: Prach and Lampert, Almost-orthogonal layers, arXiv 2208.03160, theorem 1.
    """

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        # the scale of all of raw does not matter, unless its squares overflow or vanish
        size = largest(raw.detach())
        X = raw / torch.where(size > 0, size, 1)
        sums = (X.mT @ X).abs().sum(-1)
        return X / torch.where(sums > 0, sums, 1).sqrt()

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        size = largest(value.detach())
        W = value / torch.where(size > 0, size, 1)
        power = (W.mT @ W).abs()
        for _ in range(_SQUARINGS):
            power = power @ power
            top = largest(power)
            power = power / torch.where(top > 0, top, 1)
        d = power.sum(-1)
        d = d / torch.where(largest(d) > 0, largest(d), 1)
        return value * d.clamp_min(torch.finfo(value.dtype).eps), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the spectral norm is above 1."""
        norm: Tensor = linalg.matrix_norm(value, 2)
        return (norm - 1).clamp_min(0)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the scale of raw is lost, so its Jacobian is"
            " singular"
        )

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        if value.ndim != 2:
            raise ValueError(f"{self!r} expects a matrix; got shape {tuple(value.shape)}")
