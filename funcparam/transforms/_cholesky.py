from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar, cast, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from funcparam.transforms.contract.arguments import Kind, expect_argument, is_finite
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_all,
    expect_square,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.inside import least_positive
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.softplus import inverse_softplus, log_softplus, softplus

_EPS = Kind("a finite number, at least 0", (int, float), lambda x: x >= 0 and is_finite(x))


@final
@dataclass(frozen=True)
class CholeskyFactor(Transform[Tensor]):
    r"""Lower triangular matrices with a positive diagonal.

    $$L = \operatorname{tril}(X, -1) + \operatorname{diag}(\operatorname{softplus}(X_{ii}))$$

    Raw has the shape of the value, `(..., n, n)`; its upper triangle is unused and starts at 0.
    Real and complex, where of the diagonal of raw the real part counts. A value of this kind is
    kept; of another one with a positive diagonal the lower triangle is. No diagonal rounds to 0: it
    is at least the least normal number (float16: the least number). Log-determinant over the lower
    triangle: the sum of $\log \sigma(X_{ii})$.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square; at init, if its diagonal is not
            positive.

    Example:
        >>> import torch
        >>> from funcparam.transforms import CholeskyFactor
        >>> raw, state = CholeskyFactor().right_inverse(torch.tensor([[1.0, 0.0], [-3.0, 2.0]]))
        >>> CholeskyFactor().forward(raw, state)
        tensor([[ 1.,  0.],
                [-3.,  2.]])

    Source: Stan reference manual, Cholesky factors of covariance matrices, with softplus for the
    exponential; `torch.distributions.constraints.lower_cholesky`.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return self._forward(raw, state, torch.finfo(raw.dtype))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        expect_all(
            self, _diagonal(value) > 0, "expects a positive diagonal; clamp the value's first"
        )
        return _raw_factor(value), {}

    def project(self, value: Tensor, state: State) -> Tensor:
        """The lower triangle, whose diagonal becomes the smallest normal number if not positive."""
        diagonal = _diagonal(value).clamp_min(torch.finfo(value.dtype).tiny)
        return value.tril(-1) + diagonal.diag_embed()

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector.tril()

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """The largest of |entry above the diagonal|, -diagonal and |its imaginary part|."""
        diagonal = value.diagonal(dim1=-2, dim2=-1)
        above = torch.maximum(largest(value.triu(1)), largest((-diagonal.real).clamp_min(0)))
        return torch.maximum(above, largest(diagonal.imag)) if value.is_complex() else above

    @full_precision
    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        return logsigmoid(_diagonal(raw)).sum()

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        if raw.is_complex():  # of the diagonal half an entry is
            return super().free_in_raw(raw, state)
        return torch.ones_like(raw, dtype=torch.bool).tril()

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        if value.is_complex():
            return super().free_in_value(value, state)
        return torch.ones_like(value, dtype=torch.bool).tril()

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)

    @full_precision
    def _forward(self, raw: Tensor, state: State, rounded_to: torch.finfo) -> Tensor:
        return _factor(raw, rounded_to)


@final
@dataclass(frozen=True)
class PositiveDefinite(Transform[Tensor]):
    r"""Symmetric or Hermitian positive definite matrices, by their Cholesky factor.

    $$W = L L^H + \epsilon I, \qquad
    L = \operatorname{tril}(X, -1) + \operatorname{diag}(\operatorname{softplus}(X_{ii}))$$

    Raw has the shape of the value, `(..., n, n)`; its upper triangle is unused and starts at 0.
    Real, and complex, where of the diagonal of raw the real part counts and values are Hermitian.
    A symmetric value whose eigenvalues are above `eps` is kept; of any other value the symmetric
    part is, if its eigenvalues are. The log-determinant is over the lower triangle:
    $n \log 2 + \sum_i (n - i + 1) \log L_{ii} + \log \sigma(X_{ii})$; over real and imaginary parts
    of a complex one $n \log 2 + \sum_i (2 (n - i) + 1) \log L_{ii} + \log \sigma(X_{ii})$.

    Args:
        eps: what every eigenvalue is at least, which bounds the condition.

    Raises:
        ValueError: `eps` is negative or not finite; at `fp.parametrize`, if the value is not
            square; at init, if its symmetric part minus `eps` is not positive
            definite.

    Example:
        >>> import torch
        >>> from funcparam.transforms import PositiveDefinite
        >>> raw, state = PositiveDefinite().right_inverse(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> PositiveDefinite().forward(raw, state)
        tensor([[2.0000, 1.0000],
                [1.0000, 2.0000]])

    Source: Pinheiro and Bates, Unconstrained parametrizations for variance-covariance matrices,
    Statistics and Computing 6 (1996); Stan reference manual, covariance matrices.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    eps: float = 0.0

    def __post_init__(self) -> None:
        expect_argument(self, "eps", _EPS)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        L = _factor(raw, torch.finfo(raw.dtype))
        gram = L @ L.mH
        return gram + self._shift(gram) if self.eps else gram

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        gram = (value + value.mH) / 2
        if self.eps:
            gram = gram - self._shift(gram)
        L, info = cast("tuple[Tensor, Tensor]", linalg.cholesky_ex(gram))
        expect_all(
            self,
            info == 0,
            f"expects a matrix whose symmetric part has eigenvalues above {self.eps}; this one has"
            " not: add a multiple of the identity first, or use PSDLowRank, which projects",
        )
        return _raw_factor(L), {}

    @full_precision
    def project(self, value: Tensor, state: State) -> Tensor:
        """The nearest symmetric matrix whose eigenvalues are above `eps`, by a rounding error."""
        spectrum, Q = linalg.eigh((value + value.mT) / 2)
        rounding = torch.finfo(value.dtype).eps * value.shape[-1] * largest(spectrum)
        above = torch.maximum(spectrum, self.eps + rounding)
        return (Q * above[..., None, :]) @ Q.mT

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return (vector + vector.mT) / 2

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W - W^H|, or how far the least eigenvalue is below eps if that is more."""
        spectrum: Tensor = linalg.eigvalsh((value + value.mH) / 2)
        below = (self.eps - spectrum).clamp_min(0)
        return torch.maximum(largest(value - value.mH), largest(below))

    @full_precision
    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        X = _diagonal(raw)
        n = X.shape[-1]
        powers = torch.arange(n, 0, -1, dtype=X.dtype, device=X.device)
        powers = 2 * powers - 1 if raw.is_complex() else powers
        return (log(2) + powers * log_softplus(X) + logsigmoid(X)).sum()

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        if raw.is_complex():  # of the diagonal half an entry is
            return super().free_in_raw(raw, state)
        return torch.ones_like(raw, dtype=torch.bool).tril()

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        if value.is_complex():
            return super().free_in_value(value, state)
        return torch.ones_like(value, dtype=torch.bool).tril()

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)

    def _shift(self, gram: Tensor) -> Tensor:
        return self.eps * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _diagonal(X: Tensor) -> Tensor:
    """The real part of the diagonal."""
    return X.diagonal(dim1=-2, dim2=-1).real


def _factor(raw: Tensor, rounded_to: torch.finfo) -> Tensor:
    diagonal = softplus(_diagonal(raw)).clamp_min(least_positive(raw.dtype, rounded_to))
    return raw.tril(-1) + diagonal.diag_embed()


def _raw_factor(L: Tensor) -> Tensor:
    return L.tril(-1) + inverse_softplus(_diagonal(L)).diag_embed()
