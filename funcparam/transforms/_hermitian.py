from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import (
    AnyTransform,
    State,
    Transform,
    expect_square,
    largest,
)
from funcparam.transforms.contract.precision import full_precision


@final
@dataclass(frozen=True)
class Hermitian(Transform[Tensor]):
    r"""Hermitian matrices, `W = W^H`, by real numbers, as many as there are free.

    $$W = S(X) + i A(X), \qquad S(X) = \operatorname{triu}(X) + \operatorname{triu}(X, 1)^T, \qquad
    A(X) = \operatorname{tril}(X, -1) - \operatorname{tril}(X, -1)^T$$

    For a complex value of shape `(..., n, n)` raw is real and of that shape: the real parts are in
    its upper triangle, and the imaginary ones below the diagonal. A Hermitian value is kept
    exactly; any other goes to the nearest Hermitian matrix, `(value + value.mH) / 2`. The
    log-determinant, over real and imaginary parts, is 0.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square or not complex.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Hermitian
        >>> Hermitian().forward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), {})
        tensor([[1.+0.j, 2.-3.j],
                [2.+3.j, 4.+0.j]])
    """

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return torch.complex(_mirrored(raw), _turned(raw))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        part = (value + value.mH) / 2
        return part.real.triu() + part.imag.tril(-1), {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W - W^H|."""
        return largest(value - value.mH)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: raw has the free real and imaginary parts of the value."""
        return raw.new_zeros(())

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return None

    def check(self, value: Tensor) -> None:
        _expect_complex_square(self, value, "Symmetric()")


@final
@dataclass(frozen=True)
class SkewHermitian(Transform[Tensor]):
    r"""Skew-Hermitian matrices, `W = -W^H`, by real numbers, as many as there are free.

    $$W = A(X) + i S(X)$$

    with `S` and `A` as in [`Hermitian`][funcparam.transforms.Hermitian]: for a complex value of
    shape `(..., n, n)` raw is real and of that shape, with imaginary parts in its upper triangle
    and real ones below the diagonal. A skew-Hermitian value is kept exactly; any other goes to the
    nearest one, `(value - value.mH) / 2`. The log-determinant, over real and imaginary parts, is 0.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square or not complex.

    Example:
        >>> import torch
        >>> from funcparam.transforms import SkewHermitian
        >>> SkewHermitian().forward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), {})
        tensor([[ 0.+1.j, -3.+2.j],
                [ 3.+2.j,  0.+4.j]])
    """

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return torch.complex(_turned(raw), _mirrored(raw))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        part = (value - value.mH) / 2
        return part.imag.triu() + part.real.tril(-1), {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W + W^H|."""
        return largest(value + value.mH)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: raw has the free real and imaginary parts of the value."""
        return raw.new_zeros(())

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return None

    def check(self, value: Tensor) -> None:
        _expect_complex_square(self, value, "Skew()")


def _mirrored(X: Tensor) -> Tensor:
    return X.triu() + X.triu(1).mT


def _turned(X: Tensor) -> Tensor:
    return X.tril(-1) - X.tril(-1).mT


def _expect_complex_square(transform: AnyTransform, value: Tensor, real: str) -> None:
    if not value.is_complex():
        raise ValueError(f"{transform!r} expects a complex tensor; got {value.dtype}. Use {real}")
    expect_square(transform, value)
