from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar, NamedTuple, cast, final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import (
    AnyTransform,
    State,
    Transform,
    expect_all,
    expect_filled,
    expect_square,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.orthogonal_maps import FRAMES, identity_like, skew_hermitian


@final
@dataclass(frozen=True)
class Invertible(Transform[Tensor]):
    r"""Invertible matrices, on the side of the singular ones on which they start.

    $$W = B \, C(A) \, R, \qquad C(A) = (I - A/2)^{-1} (I + A/2)$$

    an invertible base point times an orthogonal matrix times a triangular one. Raw has the shape
    of the value, `(..., n, n)`, and each entry counts once: the strict lower triangle of raw `X`
    gives the skew matrix `A = tril(X, -1) - tril(X, -1)^T`, the strict upper one that of `R`, and
    the diagonal that of `R`, positive, as `exp(asinh(X))`, which is `X + sqrt(1 + X^2)`. Of a
    complex raw the imaginary part of the diagonal goes to `A`, twice.

    State `{"base"}` holds `B`: init writes the value there and raw starts at 0, so every
    invertible value is kept, exactly. `rebase` moves it. The sign of the determinant is that of
    `B`, for ever; complex invertible matrices have no two sides.

    Log-determinant, real:

    $$n \log |\det B| - (n - 1) \log \det(I - A/2)
      + \sum_k (n - k + 1) \log R_{kk} - \tfrac12 \log(1 + X_{kk}^2)$$

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square or has no rows; at
            init, if it is singular to
            rounding.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Invertible
        >>> raw, state = Invertible().right_inverse(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> Invertible().forward(raw, state)
        tensor([[1., 2.],
                [3., 4.]])
        >>> torch.linalg.det(Invertible().forward(torch.full((2, 2), -100.0), state)) < 0
        tensor(True)

    Source: the QR factorisation and its Jacobian, Muirhead, Aspects of Multivariate Statistical
    Theory (1982), theorem 2.1.13; geotorch's `GLp` has the same image.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "relative"}

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        log_diagonal = raw.diagonal(dim1=-2, dim2=-1).real.asinh()
        return FRAMES["cayley"](raw, state["base"]) @ _triangular(raw, log_diagonal)

    def forward_stacked(self, raw: Tensor, state: State) -> Tensor:
        return self.forward(raw, state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        _expect_invertible(self, value)
        return torch.zeros_like(value), {"base": value}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.zeros_like(raw), {"base": self.forward(raw, state)}

    def project(self, value: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no projection: next to a singular matrix there are invertible ones in"
            " all directions, and none is the nearest. Train its raw"
        )

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """The distance to singular matrices, if they lie between the value and the base point."""
        if value.is_complex():
            return value.real.new_zeros(())
        if "base" not in state:
            raise ValueError(f"{self!r} expects state with a 'base', which is its constraint")
        beyond = _slogdet(value).sign != _slogdet(state["base"]).sign
        least: Tensor = linalg.svdvals(value)[..., -1]
        return largest(least * beyond)

    @full_precision
    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        n = raw.shape[-1]
        diagonal = raw.diagonal(dim1=-2, dim2=-1).real
        log_diagonal = diagonal.asinh()
        # dA is multiplied by the inverse of I - A/2 from both sides. In double precision, since of
        # an odd side there is an eigenvalue of 1, which a large A would round away.
        turn = raw.to(torch.complex128 if raw.is_complex() else torch.float64)
        singular = _slogdet(identity_like(turn) - skew_hermitian(turn) / 2).logabsdet
        inverse = -singular.to(diagonal.dtype)
        base = _slogdet(state["base"]).logabsdet
        below = torch.arange(n - 1, -1, -1, dtype=diagonal.dtype, device=diagonal.device)
        slopes = log_diagonal - torch.hypot(torch.ones_like(diagonal), diagonal).log()
        if not raw.is_complex():
            return (n * base + (n - 1) * inverse + (below * log_diagonal + slopes).sum(-1)).sum()
        columns = ((2 * below + 1) * log_diagonal + slopes).sum(-1)
        return (2 * n * (base + inverse) + columns + n * log(2)).sum()

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return None

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return None

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)
        expect_filled(self, value)


# From a logarithm of 1 that is farther off than this a determinant is not 1, whatever its rounding.
_FAR = 0.1


@final
@dataclass(frozen=True)
class SpecialLinear(Transform[Tensor]):
    r"""Matrices of determinant 1: they keep volumes and orientation.

    $$W = B \exp(A) \, R$$

    a base point times a rotation times a triangular matrix, all of determinant 1. Raw has the
    shape of the value, `(..., n, n)`: its strict lower triangle gives the skew matrix
    `A = tril(X, -1) - tril(X, -1)^T`, the strict upper one that of `R`, and the diagonal that of
    `R`: `exp(d - mean(d))` with `d = asinh(diag(X))`, which no raw makes overflow. Of a complex raw
    the imaginary part of the diagonal goes to `A`, twice, less its mean.

    In floating point the determinant is 1 to rounding times the condition number of `W`, which
    grows with the upper triangle of raw. `exp(A)` alone is a rotation to rounding for entries up
    to about 1e7 in float32; on a device, compiled or exported it is NaN where the norm of `A` is
    beyond about 1e4.

    State `{"base"}` holds `B`, where init writes the value; raw starts at 0. A value of
    determinant 1, to the rounding of its entries and within a tenth, is kept. Any other invertible
    one has its last column divided by the sign of the determinant (its phase, if complex), and then
    everything by the root `|det|^(1/n)`. `rebase` moves the base point. There is no
    log-determinant: raw has one coordinate more than such a matrix, a common factor of the
    diagonal.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not square or has no rows; at
            init, if it is singular to
            rounding.

    Example:
        >>> import torch
        >>> from funcparam.transforms import SpecialLinear
        >>> raw, state = SpecialLinear().right_inverse(torch.diag(torch.tensor([2.0, -8.0])))
        >>> SpecialLinear().forward(raw, state)
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])

    Source: the Iwasawa decomposition, Knapp, Lie Groups Beyond an Introduction (2002), section
    VI.4; geotorch's `SL` has the same image.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "relative"}

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        diagonal = raw.diagonal(dim1=-2, dim2=-1)
        log_diagonal = _centred(diagonal.real.asinh())
        if raw.is_complex():
            phases = torch.complex(diagonal.real, _centred(diagonal.imag))
            raw = raw + torch.diag_embed(phases - diagonal)
        return FRAMES["matrix_exp"](raw, state["base"]) @ _triangular(raw, log_diagonal)

    def forward_stacked(self, raw: Tensor, state: State) -> Tensor:
        return self.forward(raw, state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        _expect_invertible(self, value)
        return torch.zeros_like(value), {"base": _to_determinant_one(value)}

    @full_precision
    def refresh(self, raw: Tensor, state: State) -> State:
        return self.right_inverse(state["base"])[1]

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        # nothing is repaired: what is off by the rounding of a determinant would move all entries
        return torch.zeros_like(raw), {"base": self.forward(raw, state)}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """The larger of |log |det W|| and how far the least singular value is from the due one.

        The first has the rounding of the entries times the condition number of `W`. The second is
        what the least singular value lacks for a determinant of 1; it sees the sign too.
        """
        size = _slogdet(value).logabsdet.abs()
        return torch.maximum(largest(size), largest(_offset(value, linalg.svdvals(value))))

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_square(self, value)
        expect_filled(self, value)


def _expect_invertible(transform: AnyTransform, value: Tensor) -> None:
    spectrum: Tensor = linalg.svdvals(value)
    expect_all(
        transform,
        spectrum[..., -1] > torch.finfo(spectrum.dtype).eps * spectrum[..., 0],
        "expects an invertible matrix; this one is singular to rounding. Add a multiple of the"
        " identity",
    )


def _to_determinant_one(value: Tensor) -> Tensor:
    spectrum: Tensor = linalg.svdvals(value)
    n, eps = value.shape[-1], torch.finfo(value.dtype).eps
    sign, size = _slogdet(value)
    # a determinant is off by its condition number, and a factor would move all entries by that
    near = _offset(value, spectrum) <= 4 * n * eps * spectrum[..., 0]
    # where the least singular value is itself of that size, every determinant is near
    kept = near & (size.abs() <= _FAR) & ((sign - 1).abs() <= _FAR)
    last = value[..., -1:] / sign[..., None, None]
    scale = torch.exp(-size / n)[..., None, None]
    moved = torch.cat([value[..., :-1], last], -1) * scale
    return torch.where(kept[..., None, None], value, moved)


def _offset(value: Tensor, spectrum: Tensor) -> Tensor:
    """How far the least singular value is from what would make the determinant 1."""
    due = torch.exp(-spectrum[..., :-1].log().sum(-1))
    return (spectrum[..., -1] * _slogdet(value).sign - due).abs()


class _SignAndSize(NamedTuple):
    sign: Tensor
    logabsdet: Tensor


def _slogdet(matrix: Tensor) -> _SignAndSize:
    return _SignAndSize(*cast("tuple[Tensor, Tensor]", linalg.slogdet(matrix)))


def _triangular(raw: Tensor, log_diagonal: Tensor) -> Tensor:
    """The strict upper triangle of raw, with a positive diagonal."""
    return raw.triu(1) + torch.diag_embed(log_diagonal.exp())


def _centred(vector: Tensor) -> Tensor:
    return vector - vector.mean(-1, keepdim=True)
