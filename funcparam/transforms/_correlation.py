from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, log
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_all,
    expect_real,
    expect_square,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.inside import least_positive
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.norms import directions


@final
@dataclass(frozen=True)
class CorrelationCholesky(Transform[Tensor]):
    r"""Cholesky factors of correlation matrices: lower triangular, rows of length 1.

    $$L_{ik} = \tanh(X_{ik}) \prod_{j<k} \operatorname{sech}(X_{ij}), \qquad
    L_{ii} = \prod_{j<i} \operatorname{sech}(X_{ij})$$

    `L @ L.mT` is the correlation matrix. For a value of shape `(..., n, n)` raw is
    `(..., n (n - 1) / 2)`, the entries below the diagonal row by row; `tanh` of them are the
    canonical partial correlations, and 0 is the identity. Real dtypes. No diagonal rounds to 0: it
    is at least the least normal number (float16: the least number).

    A value of this kind is kept. Of any other with a positive diagonal the lower triangle is
    taken and each row divided by its length. The log-determinant is over the entries below the
    diagonal: the sum of $\log \operatorname{sech}^2 X_{ik} + \frac12 \sum_{j<k} \log
    \operatorname{sech}^2 X_{ij}$.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square, empty or not real; at init,
            if its diagonal is not positive.

    Example:
        >>> import torch
        >>> from funcparam.transforms import CorrelationCholesky
        >>> L = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> raw, state = CorrelationCholesky().right_inverse(L)
        >>> raw.tanh()
        tensor([0.6000])
        >>> CorrelationCholesky().forward(raw, state)
        tensor([[1.0000, 0.0000],
                [0.6000, 0.8000]])

    Source: Lewandowski, Kurowicka and Joe, Journal of Multivariate Analysis 100 (2009); Stan
    reference manual, Cholesky factors of correlation matrices.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return self._forward(raw, state, torch.finfo(raw.dtype))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        diagonal = value.diagonal(dim1=-2, dim2=-1)
        expect_all(self, diagonal > 0, "expects a positive diagonal; clamp the value's first")
        lower = value.tril()
        # The length of what follows in a row, added up from the end: 1 - cumsum would cancel. The
        # diagonal's square may underflow, the diagonal does not.
        squares = lower.square().flip(-1).cumsum(-1).flip(-1)
        rest = torch.maximum(pad(squares[..., 1:], (0, 1)).sqrt(), diagonal.unsqueeze(-1))
        i, j = torch.tril_indices(*value.shape[-2:], offset=-1, device=value.device)
        return torch.asinh((lower / rest)[..., i, j]), {}

    def project(self, value: Tensor, state: State) -> Tensor:
        """Rows of the lower triangle over their lengths; the diagonal is positive at least."""
        diagonal = value.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(value.dtype).tiny)
        return directions(value.tril(-1) + torch.diag_embed(diagonal), (-1,))

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """The largest of |length of a row - 1|, |entry above the diagonal| and -diagonal."""
        lengths: Tensor = linalg.vector_norm(value, dim=-1)
        below = (-value.diagonal(dim1=-2, dim2=-1)).clamp_min(0)
        return torch.stack([largest(lengths - 1), largest(value.triu(1)), largest(below)]).amax()

    @full_precision
    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        X = _below_diagonal(raw)
        return (_log_sech2(X) + _log_left(X).tril(-1) / 2).sum()

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return None

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return torch.ones_like(value, dtype=torch.bool).tril(-1)

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_square(self, value)
        if value.shape[-1] == 0:
            raise ValueError(
                f"{self!r} expects a matrix with at least one row; got shape {tuple(value.shape)}"
            )

    @full_precision
    def _forward(self, raw: Tensor, state: State, rounded_to: torch.finfo) -> Tensor:
        X = _below_diagonal(raw)
        identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        left = (_log_left(X) / 2).exp().clamp_min(least_positive(X.dtype, rounded_to))
        return (X.tanh() + identity) * left


def _below_diagonal(raw: Tensor) -> Tensor:
    """Put a vector below the diagonal of a matrix, row by row, with zeros elsewhere."""
    n = (1 + isqrt(1 + 8 * raw.shape[-1])) // 2
    i = torch.arange(n, device=raw.device).unsqueeze(-1)
    j = torch.arange(n, device=raw.device)
    index = torch.where(j < i, i * (i - 1) // 2 + j, raw.shape[-1])
    return pad(raw, (0, 1))[..., index]


def _log_sech2(X: Tensor) -> Tensor:
    """The logarithm of 1 - tanh(X)^2, smooth and finite everywhere, below the diagonal."""
    return (log(4) + logsigmoid(2 * X) + logsigmoid(-2 * X)).tril(-1)


def _log_left(X: Tensor) -> Tensor:
    """The logarithm of how much of a row's squared length 1 the entries before each one leave."""
    return pad(_log_sech2(X).cumsum(-1)[..., :-1], (1, 0))
