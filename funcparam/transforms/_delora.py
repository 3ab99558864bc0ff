from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms._lora import LoRA, uniform_factor
from funcparam.transforms.contract.arguments import NUMBER, POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_filled
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.norms import norms

# below this a length counts as this, as in peft
_SHORT = 1e-4


@final
@dataclass(frozen=True)
class DeLoRA(Transform[Mapping[str, Tensor]]):
    r"""Decoupled low-rank adaptation: LoRA whose parts have length 1, and one trained strength.

    $$W = W_0 + \frac{\lambda}{r} \sum_{i=1}^{r} \frac{b_i a_i}{\lVert b_i \rVert \lVert a_i
    \rVert} \operatorname{diag}(c)$$

    where `b_i` are columns of `B`, `a_i` rows of `A`, and `c_j` is the length of column `j` of
    `W_0`. So the update is at most `lambda` as long as a diagonal of these lengths, however far
    `A` and `B` go.

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`: raw is `{"A": (rank, n), "B":
    (m, rank), "lambda": ()}`; state is `{"base": W_0, "norms": c}`. Real and complex. At init
    `B = 0`, so every value is kept exactly, and `A` is drawn as in
    [`LoRA`][funcparam.transforms.LoRA]. Lengths below 1e-4 count as 1e-4.

    Args:
        rank: the inner dimension, positive.
        strength: what `lambda` starts with; peft's `delora_lambda`.

    Raises:
        ValueError: `rank` is not positive or `strength` not finite; at `fp.parametrize`, if the
            value has fewer than two dimensions or `rank` exceeds a side of its matrix.

    Example:
        >>> import torch
        >>> from funcparam.transforms import DeLoRA
        >>> raw, state = DeLoRA(rank=1).right_inverse(torch.eye(2))
        >>> raw = {"A": torch.tensor([[0.0, 9.0]]), "B": torch.tensor([[7.0], [0.0]]), **{
        ...     "lambda": torch.tensor(0.5)}}
        >>> DeLoRA(rank=1).forward(raw, state)
        tensor([[1.0000, 0.5000],
                [0.0000, 1.0000]])

    Source: Bini et al., DeLoRA, arXiv 2503.18225, equation 9; peft's `DeloraConfig`.
    """

    is_adapter: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = {
        "A": "direction",
        "B": "direction",
        "lambda": "magnitude",
    }

    rank: int
    strength: float = 15.0

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)
        expect_argument(self, "strength", NUMBER)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base, A, B = state["base"], raw["A"], raw["B"]
        strength = raw["lambda"] / self.rank / _lengths(A, 1)  # a product of lengths may overflow
        delta = ((B / _lengths(B, 0) * strength) @ A) * state["norms"]
        return base + delta.reshape(base.shape).to(base.dtype)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        matrix = value.flatten(1)
        m, n = matrix.shape
        raw = {
            "A": uniform_factor(value, self.rank, n, generator),
            "B": value.new_zeros(m, self.rank),
            "lambda": value.real.new_full((), self.strength),
        }
        return raw, {"base": value, "norms": norms(matrix, (0,)).squeeze(0)}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest singular value of `value - base` beyond `rank`, which is necessary only."""
        return LoRA(self.rank).violation(value, state)

    def check(self, value: Tensor) -> None:
        LoRA(self.rank).check(value)
        expect_filled(self, value.flatten(1))


def _lengths(X: Tensor, dim: int) -> Tensor:
    """The norms along a dimension, at least `_SHORT`."""
    return norms(X, (dim,)).squeeze(dim).clamp_min(_SHORT)
