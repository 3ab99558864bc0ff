from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import INTEGER, POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_dim,
    expect_matrix,
    expect_real,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.kernels import (
    expect_groups,
    grouped,
    lag_sums,
    operator_norm,
)
from funcparam.transforms.numerics.slices import other_dims
from funcparam.transforms.numerics.softplus import inverse_softplus, softplus


@final
@dataclass(frozen=True)
class LInfLipschitz(Transform[Mapping[str, Tensor]]):
    r"""Rows whose 1-norms stay below a trained bound: the layer's Lipschitz constant.

    $$W_i = X_i \, \min\left(1, \frac{\operatorname{softplus}(c)}{\lVert X_i \rVert_1}\right)$$

    `softplus(c)` bounds the layer's Lipschitz constant in the maximum norm, of a convolution with
    any padding, stride and dilation as well. A row of a value is what belongs to an index of `dim`,
    that is to an output. Raw is `{"weight": X, "bound": c}` with a scalar `c`: penalise
    `softplus(raw["bound"])` to make the network smooth. Real dtypes. Every value is kept: init
    takes the largest row's 1-norm for the bound. Of a transposed convolution with groups a row has
    the inputs of all groups in it, and the bound is larger than need be.

    Args:
        dim: the dimension of outputs: 0 for Linear and Conv, 1 for ConvTranspose. Negative ones
            count from the end.

    Raises:
        ValueError: at `fp.parametrize`, if the value has fewer than two dimensions, no dimension
            `dim`, or is not real.

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

    roles: ClassVar[Mapping[str, Role]] = {"bound": "magnitude"}

    dim: int = 0

    def __post_init__(self) -> None:
        expect_argument(self, "dim", INTEGER)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        X = raw["weight"]
        bound = softplus(raw["bound"]).clamp_min(torch.finfo(X.dtype).tiny)
        # min(1, bound / sum) without a division by 0
        return X * (bound / torch.maximum(self._sums(X), bound))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        bound = largest(self._sums(value))
        # of a weight of zeros the bound is positive as well, or its gradient would be 0
        bound = inverse_softplus(bound.clamp_min(torch.finfo(value.dtype).eps))
        return {"weight": value, "bound": bound}, {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: the bound is trained, so every value has one."""
        return value.new_zeros(())

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_matrix(self, value)
        expect_dim(self, value, self.dim)

    def _sums(self, X: Tensor) -> Tensor:
        """The 1-norm of each row."""
        return X.abs().sum(other_dims(X, self.dim), keepdim=True)


# the columns of a matrix to the power 2^12 are its Perron vector, if the gap is one percent
_SQUARINGS = 12


@final
@dataclass(frozen=True)
class AOL(Transform[Tensor]):
    r"""Almost orthogonal matrices and convolution kernels: spectral norm at most 1.

    $$W = X \operatorname{diag}\left(\sum\nolimits_j N_{ij}(X)\right)^{-1/2}, \qquad
    N_{ij}(X) = \sum_s \left|\sum\nolimits_t X_t^T X_{t+s}\right|_{ij}$$

    Each input is scaled by what its column has in common with all columns. Of a matrix `(m, n)`,
    as `Linear` has, there is one `t` and `N = |X^T X|`. Of a kernel `(out, in / groups, *taps)`,
    as `Conv1d` to `Conv3d` have, `t` goes over its taps and `s` over all lags, in every direction.
    Then the convolution has spectral norm at most 1 for inputs of every size, with any stride and
    dilation, and so does the transposed convolution by the same kernel. That is so with any zero
    padding, and with circular padding of at most `dilation * (k - 1)` entries in all along each
    axis, which `padding="same"` takes. Wider circular padding, as `padding=1` of two taps, repeats
    outputs, and reflected or replicated padding repeats inputs: with these the norm may be above 1.

    Raw has the shape of the value. Inputs of zeros stay 0. The image is smaller than the values
    of spectral norm at most 1: it is those `W` with `N(W) d = d` for a positive `d`, orthonormal
    columns and orthogonal kernels among them. Such a value is kept, with `W diag(d)` as raw. Any
    other value, of spectral norm below 1 too, is divided by the root of the largest eigenvalue of
    `N(W)`, where its eigenvector `d` is positive; inputs that have no share in it get a norm of
    their own. All of this is for each group by itself. Real dtypes.

    Args:
        groups: the convolution's `groups`.

    Raises:
        TypeError: `groups` is not an integer.
        ValueError: `groups` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions or is not real, or if `groups` does not divide the outputs, or is not 1 for
            a matrix.

    Example:
        >>> import torch
        >>> from funcparam.transforms import AOL
        >>> AOL().forward(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), {})
        tensor([[1., 0.],
                [0., 1.]])
        >>> AOL().forward(torch.tensor([[[2.0, 2.0]]]), {})  # half the sum of two neighbours
        tensor([[[0.5000, 0.5000]]])

    Source: Prach and Lampert, Almost-orthogonal layers, arXiv 2208.03160, theorems 1 and 2.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "direction"}

    groups: int = 1

    def __post_init__(self) -> None:
        expect_argument(self, "groups", POSITIVE_INTEGER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        # the scale of all of raw does not matter, unless its squares overflow or vanish
        size = largest(raw.detach())
        X = grouped(raw / torch.where(size > 0, size, 1), self.groups)
        sums = lag_sums(X).sum(-1)
        return (X / _per_input(torch.where(sums > 0, sums, 1).sqrt(), X)).reshape(raw.shape)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        size = largest(value.detach())
        power = lag_sums(grouped(value / torch.where(size > 0, size, 1), self.groups))
        for _ in range(_SQUARINGS):
            total = power.sum((-2, -1), keepdim=True)
            power = power / torch.where(total > 0, total, 1)
            power = power @ power
        d = power.sum(-1)
        mean = d.mean(-1, keepdim=True)
        d = (d / torch.where(mean > 0, mean, 1)).clamp_min(torch.finfo(value.dtype).eps)
        kernel = grouped(value, self.groups)
        return (kernel * _per_input(d, kernel)).reshape(value.shape), {}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        length, size = largest(raw), largest(self.forward(raw, state))
        return raw / torch.where(length > 0, length, 1) * size, state

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the spectral norm is above 1; a kernel's on a torus four times as wide as it."""
        return (operator_norm(grouped(value, self.groups)) - 1).clamp_min(0)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the scale of raw is lost, so its Jacobian is"
            " singular"
        )

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        if value.ndim < 2:
            raise ValueError(
                f"{self!r} expects a matrix or a convolution kernel (out, in / groups, *taps);"
                f" got shape {tuple(value.shape)}"
            )
        if value.ndim == 2 and self.groups != 1:
            raise ValueError(
                f"{self!r} expects a convolution kernel: a matrix, of shape {tuple(value.shape)},"
                " has no groups. Use AOL()"
            )
        if value.ndim > 2 and value.numel() == 0:
            raise ValueError(
                f"{self!r} expects a kernel with entries; got shape {tuple(value.shape)}"
            )
        expect_groups(self, value, self.groups)


def _per_input(x: Tensor, kernel: Tensor) -> Tensor:
    """Shape (groups, in) to be broadcast over outputs and taps."""
    return x.reshape(x.shape[0], 1, x.shape[1], *[1] * (kernel.ndim - 3))
