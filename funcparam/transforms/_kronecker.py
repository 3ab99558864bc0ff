from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from funcparam.transforms._identity import Identity
from funcparam.transforms._low_rank import balanced_factors, singular_value
from funcparam.transforms._parts import checked_parts, named, own_raw, own_tensors
from funcparam.transforms.contract.arguments import keep_integers
from funcparam.transforms.contract.base import (
    AnyTransform,
    State,
    Transform,
    expect_filled,
    expect_matrix,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role

_FREE = Identity()


@final
@dataclass(frozen=True)
class Kronecker(Transform[Mapping[str, Tensor]]):
    r"""Kronecker products of two smaller matrices.

    $$W = A \otimes B$$

    For a value of shape `(..., m, n)` and `left = (p, q)` raw is `{"A": (..., p, q),
    "B": (..., m / p, n / q)}`. With a transform for a factor, its raw and state stand under the
    factor's name: those of `Kronecker((2, 2), B=LowRank(1))` are `"A"`, `"B.A"` and `"B.B"`. Real
    and complex. A Kronecker product is kept, as far as the factors' transforms keep it; any other
    value goes to the nearest one in the Frobenius norm: rearranged to have a row for each block, it
    is of rank 1 where it is a product, so its largest singular value and vectors are what is kept.
    Zero starts with `A = 0` and a `B` that is drawn, so that it trains.

    Args:
        left: the shape of `A`, two positive integers.
        A: the transform of the left factor.
        B: that of the right one.

    Raises:
        ValueError: `left` is not two positive integers; at `fp.parametrize`, if the value has
            fewer than two dimensions, `left` does not divide its last two, or a transform cannot
            serve its factor.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Kronecker
        >>> raw = {"A": torch.tensor([[1.0, 2.0]]), "B": torch.tensor([[3.0], [4.0]])}
        >>> Kronecker(left=(1, 2)).forward(raw, {})
        tensor([[3., 6.],
                [4., 8.]])

    Source: Van Loan and Pitsianis, Approximation with Kronecker products (1993).
    """

    left: tuple[int, int]
    A: AnyTransform = _FREE
    B: AnyTransform = _FREE

    def __post_init__(self) -> None:
        for part in checked_parts("Kronecker", (self.A, self.B)):
            if part.takes():
                raise ValueError(f"Kronecker expects parts that take no other value; got {part!r}")
        keep_integers(self, "left")
        if len(self.left) != 2 or min(self.left) <= 0:
            raise ValueError(f"Kronecker expects left to be two positive sides; got {self.left}")

    def adapts(self, key: str) -> bool:
        name, _, own = key.partition(".")
        return (self.A if name == "A" else self.B).adapts(own)

    def role(self, key: str) -> Role:
        name, _, own = key.partition(".")
        role = (self.A if name == "A" else self.B).role(own)
        return "factor" if role == "weight" else role

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        (A, left, own_A), (B, right, own_B) = self._each(raw, state)
        left, right = A.forward(left, own_A), B.forward(right, own_B)
        product = left[..., :, None, :, None] * right[..., None, :, None, :]
        return product.flatten(-2).flatten(-3, -2)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        right, left = balanced_factors(self._rearranged(value), 1, generator)
        batch, (m, n), (p, q) = value.shape[:-2], value.shape[-2:], self.left
        A, own_A = self.A.right_inverse(left.reshape(*batch, p, q), generator=generator)
        right = right.reshape(*batch, m // p, n // q)
        B, own_B = self.B.right_inverse(right, generator=generator)
        return named({"A": A, "B": B}), named({"A": own_A, "B": own_B})

    def update(self, raw: Mapping[str, Tensor], state: State) -> State:
        (A, left, own_A), (B, right, own_B) = self._each(raw, state)
        return named({"A": A.update(left, own_A), "B": B.update(right, own_B)})

    def refresh(self, raw: Mapping[str, Tensor], state: State) -> State:
        (A, left, own_A), (B, right, own_B) = self._each(raw, state)
        return named({"A": A.refresh(left, own_A), "B": B.refresh(right, own_B)})

    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        (A, left, own_A), (B, right, own_B) = self._each(raw, state)
        left, own_A = A.rebase(left, own_A)
        right, own_B = B.rebase(right, own_B)
        return named({"A": left, "B": right}), named({"A": own_A, "B": own_B})

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Second singular value of the rearranged value; what the factors may be is left out."""
        return singular_value(self._rearranged(value), 1)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the factors' scale is not unique, so the"
            " Jacobian is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value)
        if any(side % part for side, part in zip(value.shape[-2:], self.left, strict=True)):
            raise ValueError(
                f"{self!r} expects a matrix with sides divisible by {self.left};"
                f" got shape {tuple(value.shape)}"
            )
        p, q = self.left
        right = (value.shape[-2] // p, value.shape[-1] // q)
        for part, sides in ((self.A, self.left), (self.B, right)):
            shape = (*value.shape[:-2], *sides)
            part.check(torch.empty(shape, dtype=value.dtype, device="meta"))

    def _each(self, raw: Mapping[str, Tensor], state: State) -> Iterator[tuple[Any, Any, State]]:
        """Each factor's transform, with its raw and its state."""
        for key, part in (("A", self.A), ("B", self.B)):
            yield part, own_raw(raw, key), own_tensors(state, key)

    def _rearranged(self, value: Tensor) -> Tensor:
        """One row for each block."""
        (m, n), (p, q) = value.shape[-2:], self.left
        blocks = value.reshape(*value.shape[:-2], p, m // p, q, n // q).transpose(-3, -2)
        return blocks.flatten(-2).flatten(-3, -2)
