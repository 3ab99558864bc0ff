from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import NUMBER, POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_filled,
    expect_matrix,
    expect_numbers,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role


@final
@dataclass(frozen=True)
class RandLoRA(Transform[Mapping[str, Tensor]]):
    r"""A frozen weight plus scaled products of frozen random factors, of full rank together.

    $$W = W_0 + \frac{\alpha}{r} \sum_{j=1}^{k} B_j \operatorname{diag}(\lambda_j) A
    \operatorname{diag}(\gamma_j), \qquad k = \lceil \min(m, n) / r \rceil$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`, or to its transpose if `m < n`,
    of sides `long` and `short`: raw is `{"lambda": (k, rank), "gamma": (k, short)}`; state is
    `{"base": W_0, "A": (rank, short), "B": (k, long, rank), "scale": ()}`. Real and complex. At
    init `lambda = 0`, so every value is kept exactly, `gamma = 1 / max(k, short)`, and `A` and `B`
    are drawn from normal distributions of deviation 1, from `generator` or torch's default one.
    The paper shares them among layers: write the same ones into their states.

    Args:
        rank: the inner dimension, positive. A larger one takes fewer products.
        alpha: the numerator of the scale; None takes `rank`, hence scale 1.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions, or its dtype has no such scale.

    Example:
        >>> import torch
        >>> from funcparam.transforms import RandLoRA
        >>> raw, state = RandLoRA(rank=1).right_inverse(torch.eye(2))
        >>> RandLoRA(rank=1).forward(raw, state)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Albert et al., RandLoRA, arXiv 2502.00987, equation 3; peft's `RandLoraConfig`.
    """

    is_adapter: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = {"lambda": "magnitude", "gamma": "magnitude"}

    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)
        expect_argument(self, "alpha", NUMBER, optional=True)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        scaled = raw["lambda"].unsqueeze(-1) * state["A"] * raw["gamma"].unsqueeze(-2)
        delta = state["scale"] * (state["B"] @ scaled).sum(0)
        if base.flatten(1).shape != delta.shape:
            delta = delta.mT
        return base + delta.reshape(base.shape).to(base.dtype)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        short, long = sorted(value.flatten(1).shape)
        products = -(-short // self.rank)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=value.dtype, device=value.device)

        raw = {
            "lambda": value.new_zeros(products, self.rank),
            "gamma": value.new_full((products, short), 1 / max(products, short)),
        }
        factors = {"A": normal(self.rank, short), "B": normal(products, long, self.rank)}
        return raw, {"base": value, **factors, "scale": value.real.new_full((), self._scale())}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: the update has full rank."""
        return value.real.new_zeros(())

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value.flatten(1))
        expect_numbers(self, value.dtype, scale=self._scale())

    def _scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank
