from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal, cast, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import (
    NUMBER,
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    expect_argument,
    expect_choice,
)
from funcparam.transforms.contract.base import State, Transform, expect_matrix, expect_numbers
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg

# starts that take a part of the value out of the base
_FROM_THE_VALUE = ("pissa", "olora")


@final
@dataclass(frozen=True)
class LoRA(Transform[Mapping[str, Tensor]]):
    r"""Low-rank adaptation: a frozen weight plus a trained product of two thin matrices.

    $$W = W_0 + B \operatorname{diag}(s) A$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`: raw is `{"A": (rank, n),
    "B": (m, rank)}`; state is `{"base": W_0, "scale": s}` with `s` of shape `(rank,)`, which
    init fills with `alpha / rank`. Scale 0 switches the adapter, or one rank of it, off. Real
    and complex.

    Every value is kept, exactly where `B` starts at 0. Where raw starts is `init`, in peft's words:

    * `"kaiming"`: `B = 0`, and `A` is drawn uniformly from `[-1/sqrt(n), 1/sqrt(n)]` as in the
      reference code: with `A = 0` nothing would train. The draw comes from `generator`, or
      torch's default one.
    * `"gaussian"`: `B = 0`, and `A` is drawn from a normal distribution of deviation `1 / rank`.
    * `"pissa"`: the value's largest singular values and vectors, `A = sqrt(S / s) V^H` and
      `B = U sqrt(S / s)`, and the base is the rest of the value.
    * `"olora"`: the first rows of R and columns of Q of the value's QR decomposition, and the base
      is the rest of the value.

    Args:
        rank: the inner dimension, positive.
        alpha: the numerator of the scale; None takes `rank`, hence scale 1.
        init: `"kaiming"`, `"gaussian"`, `"pissa"` or `"olora"`.
        scale: `"lora"` for `alpha / rank`, or `"rslora"` for `alpha / sqrt(rank)`, which keeps the
            size of the update the same for all ranks.

    Raises:
        ValueError: `rank` is not positive, `init` or `scale` is none of these, or `alpha` is not
            positive with `"pissa"`; at `fp.parametrize`, if the value has fewer than two
            dimensions, `rank` exceeds one of the matrix's, or its dtype has no such scale.

    Example:
        >>> import torch
        >>> from funcparam.transforms import LoRA
        >>> raw, state = LoRA(rank=1, alpha=2.0).right_inverse(torch.eye(2))
        >>> LoRA(rank=1, alpha=2.0).forward(raw, state)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1; Meng et al., PiSSA, arXiv 2404.02948;
    Büyükakyüz, OLoRA, arXiv 2406.01775; Kalajdzievski, rsLoRA, arXiv 2312.03732.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": "factor", "B": "factor"}

    is_adapter: ClassVar[bool] = True

    rank: int
    alpha: float | None = None
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"
    scale: Literal["lora", "rslora"] = "lora"

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)
        kind = POSITIVE_NUMBER if self.init == "pissa" else NUMBER  # it divides by the scale
        expect_argument(self, "alpha", kind, optional=True)
        expect_choice(self, "init", ("kaiming", "gaussian", "pissa", "olora"))
        expect_choice(self, "scale", ("lora", "rslora"))

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        delta = (raw["B"] * state["scale"]) @ raw["A"]
        return base + delta.reshape(base.shape)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        matrix = value.flatten(1)
        scale = self._scale()
        A, B = self._factors(matrix, scale, generator)
        base = value
        if self.init in _FROM_THE_VALUE:
            base = value - scale * (B @ A).reshape(value.shape)
        return {"A": A, "B": B}, {"base": base, "scale": value.new_full((self.rank,), scale)}

    @full_precision
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
        expect_numbers(self, value.dtype, scale=self._scale())

    def _scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scale == "lora" else sqrt(self.rank))

    def _factors(
        self, matrix: Tensor, scale: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        (m, n), r = matrix.shape, self.rank
        if self.init == "pissa":
            U, S, Vh = cast(
                "tuple[Tensor, Tensor, Tensor]", linalg.svd(matrix, full_matrices=False)
            )
            root = (S[:r] / scale).sqrt()
            return root.unsqueeze(1) * Vh[:r], U[:, :r] * root
        if self.init == "olora":
            Q, R = cast("tuple[Tensor, Tensor]", linalg.qr(matrix))
            return R[:r].contiguous(), Q[:, :r].contiguous()
        zeros = matrix.new_zeros(m, r)
        if self.init == "kaiming":
            return uniform_factor(matrix, r, n, generator), zeros
        drawn = torch.randn(r, n, generator=generator, dtype=matrix.dtype, device=matrix.device)
        return drawn / r, zeros


def uniform_factor(like: Tensor, m: int, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw a matrix uniformly from [-1/sqrt(n), 1/sqrt(n)], complex ones in both parts."""
    unit = torch.rand(m, n, generator=generator, dtype=like.dtype, device=like.device)
    middle = 0.5 + 0.5j if like.is_complex() else 0.5
    return (unit - middle) * (2 / sqrt(n))
