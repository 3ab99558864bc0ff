from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, final

import torch
from torch import Tensor

from funcparam.transforms._frozen import Frozen
from funcparam.transforms._low_rank import balanced_factors, singular_value
from funcparam.transforms._parts import (
    Parts,
    checked_parts,
    kept_by,
    merged,
)
from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument, expect_choice
from funcparam.transforms.contract.base import AnyTransform, State, expect_filled, expect_matrix
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg


@final
@dataclass(frozen=True, init=False)
class Product(Parts):
    r"""The matrix product of what its parts make: `Product(a, b, inner=r)` is `a(…) @ b(…)`.

    Raw and state hold those of the parts under their position, as in
    [`Cat`][funcparam.transforms.Cat]. For a value of shape `(..., m, n)`, `inner` is the size that
    is summed over, and says where the right inverse puts the value:

    * a number `r`: the first part is `(m, r)`, the last `(r, n)`, and what is between `(r, r)`.
      The first starts with `U sqrt(S)` of the value's truncated singular value decomposition, those
      between with the identity, and the last with what then is nearest to `sqrt(S) V^H`. A value
      of rank `r` is kept where the last part takes that; any other goes to the nearest one of
      that rank. Of zero the first factor is 0 and the last is drawn, so that it trains; the other
      way round if the first cannot be 0. Draws come from `generator` or torch's default one.
    * `"in"`: the first part has the shape of the value and takes it, and the others are `(n, n)`
      and start with the identity, which acts on the inputs of the weight;
    * `"out"`: the last part has the shape of the value and takes it, and the others are `(m, m)`.

    `Product(Frozen(), Orthogonal(), inner="in")` turns the inputs of a frozen weight, and
    `Product(Stiefel(), Identity(), inner=8)` is low-rank with an orthonormal factor. A part that
    cannot start with the identity starts with its projection, and the one that takes the value
    makes up for it. Real and complex, as far as the parts are.

    Args:
        *parts: at least two transforms.
        inner: the inner size: a positive integer, `"in"` or `"out"`.

    Raises:
        ValueError: there are fewer than two parts, or `inner` is none of these; at
            `fp.parametrize`, if a part cannot serve its factor, or `inner` exceeds a side; at init,
            if a part refuses its factor.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Diagonal, Frozen, Product
        >>> transform = Product(Frozen(), Diagonal(), inner="in")
        >>> raw, state = transform.right_inverse(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> transform.forward({"1": torch.tensor([1.0, 10.0])}, state)
        tensor([[ 1., 20.],
                [ 3., 40.]])
    """

    parts: tuple[AnyTransform, ...]
    inner: int | Literal["in", "out"]

    def __init__(self, *parts: AnyTransform, inner: int | Literal["in", "out"] = "in") -> None:
        object.__setattr__(self, "inner", inner)
        if isinstance(inner, str):
            expect_choice(self, "inner", ("in", "out"))
        else:
            expect_argument(self, "inner", POSITIVE_INTEGER)
        object.__setattr__(self, "parts", checked_parts("Product", parts))
        if len(parts) < 2:
            raise ValueError(f"Product expects at least two transforms; got {parts}")

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.parts))}, inner={self.inner!r})"

    def role(self, key: str) -> Role:
        role = super().role(key)
        return "factor" if role == "weight" else role

    def adapts(self, key: str) -> bool:
        """Beside a frozen part the others are what is added to it, and are trained."""
        return super().adapts(key) or any(isinstance(part, Frozen) for part in self.parts)

    def kept_weight(self, state: State) -> Tensor | None:
        return kept_by(self.parts, state)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return reduce(
            torch.matmul, [part.forward(X, own) for part, X, own in self.each(raw, state)]
        )

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        pairs: dict[int, tuple[Any, State]] = {}

        def start(i: int, factor: Tensor) -> Tensor:
            pairs[i] = self.parts[i].right_inverse(factor, generator=generator)
            return self.parts[i].forward(*pairs[i])

        last = len(self.parts) - 1
        if self.inner == "in":
            others = reduce(
                torch.matmul, [start(i, _identity(value, -1)) for i in range(1, last + 1)]
            )
            start(0, linalg.solve(others, value, left=False))
        elif self.inner == "out":
            turns = [start(i, _identity(value, -2)) for i in range(last)]
            start(last, linalg.solve(reduce(torch.matmul, turns), value))
        else:
            A, B = balanced_factors(value, self.inner, generator)
            middle = [start(i, _identity(A, -2)) for i in range(1, last)]
            # a part that cannot be 0, as an orthonormal one, shall not start with unit vectors
            drawn = torch.randn(B.shape, generator=generator, dtype=B.dtype, device=B.device)
            stuck = (B == 0).all(-2, keepdim=True) & (start(0, B) != 0).any(-2, keepdim=True)
            others = reduce(torch.matmul, middle, start(0, torch.where(stuck, drawn, B)))
            # The factor nearest to A with which the product is nearest to the value. Each step
            # leaves the rounding of the A before it, which beside orthonormal columns is as large
            # as the root of the value: four are enough for the least number.
            inverse: Tensor = linalg.pinv(others)
            for _ in range(4):
                A = A + inverse @ (value - others @ A)
            start(last, A)
        ordered = [pairs[i] for i in range(last + 1)]
        return merged([raw for raw, _ in ordered]), merged([own for _, own in ordered])

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest singular value beyond `inner`, which is necessary only; else NaN."""
        if isinstance(self.inner, str):
            return value.real.new_full((), torch.nan)
        return singular_value(value, self.inner)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the factors of a matrix are not unique, so the"
            " Jacobian is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value)
        m, n = value.shape[-2:]
        if isinstance(self.inner, int) and self.inner > min(m, n):
            raise ValueError(
                f"{self!r} expects a matrix with both sides at least {self.inner};"
                f" got shape {tuple(value.shape)}"
            )
        inner = n if self.inner == "in" else m if self.inner == "out" else self.inner
        sides = [m, *[inner] * (len(self.parts) - 1), n]
        for part, rows, columns in zip(self.parts, sides, sides[1:], strict=False):
            shape = (*value.shape[:-2], rows, columns)
            part.check(torch.empty(shape, dtype=value.dtype, device="meta"))


def _identity(like: Tensor, dim: int) -> Tensor:
    """The identity of the side `dim`, once for each matrix of a batch."""
    n = like.shape[dim]
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    return eye.expand(*like.shape[:-2], n, n).clone()
