from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import NUMBER, POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_matrix
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.numerics.linalg import linalg


@final
@dataclass(frozen=True)
class LoRA(Transform[Mapping[str, Tensor]]):
    r"""Low-rank adaptation: a frozen weight plus a trained product of two thin matrices.

    $$W = W_0 + B \operatorname{diag}(s) A$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`: raw is `{"A": (rank, n),
    "B": (m, rank)}`; state is `{"base": W_0, "scale": s}` with `s` of shape `(rank,)`, which
    init fills with `alpha / rank`. Scale 0 switches the adapter, or one rank of it, off. Real
    and complex.

    At init `B = 0`, so every value is kept exactly, and `A` is drawn uniformly from
    `[-1/sqrt(n), 1/sqrt(n)]` as in the reference code: with `A = 0` nothing would train. The
    draw comes from `generator`, or torch's default one.

    Args:
        rank: the inner dimension, positive.
        alpha: the numerator of the scale; None takes `rank`, hence scale 1.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions or `rank` exceeds one of the matrix's.

    Example:
        >>> import torch
        >>> from funcparam.transforms import LoRA
        >>> raw, state = LoRA(rank=1, alpha=2.0).right_inverse(torch.eye(2))
        >>> LoRA(rank=1, alpha=2.0).forward(raw, state)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1.
    """

    is_adapter: ClassVar[bool] = True

    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)
        expect_argument(self, "alpha", NUMBER, optional=True)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        delta = (raw["B"] * state["scale"]) @ raw["A"]
        return base + delta.reshape(base.shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        m, n = value.flatten(1).shape
        scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        return (
            {
                "A": uniform_factor(value, self.rank, n, generator),
                "B": value.new_zeros(m, self.rank),
            },
            {"base": value, "scale": value.new_full((self.rank,), scale)},
        )

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest singular value of `value - base` beyond `rank`."""
        if "base" not in state:
            raise ValueError(f"{self!r} expects state with a 'base', which is its constraint")
        spectrum: Tensor = linalg.svdvals((value - state["base"]).flatten(1))
        return torch.nn.functional.pad(spectrum, (0, 1))[self.rank]

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        m, n = value.flatten(1).shape
        if self.rank > min(m, n):
            raise ValueError(
                f"{self!r} expects a matrix with both sides at least {self.rank};"
                f" got shape {tuple(value.shape)}, as a matrix {(m, n)}"
            )


def uniform_factor(like: Tensor, m: int, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw a matrix uniformly from [-1/sqrt(n), 1/sqrt(n)], complex ones in both parts."""
    unit = torch.rand(m, n, generator=generator, dtype=like.dtype, device=like.device)
    middle = 0.5 + 0.5j if like.is_complex() else 0.5
    return (unit - middle) * (2 / sqrt(n))
