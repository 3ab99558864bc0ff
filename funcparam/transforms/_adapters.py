from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms._base import State, Transform, expect_dim, expect_real, largest
from funcparam.transforms._linalg import linalg
from funcparam.transforms._lora import LoRA
from funcparam.transforms._precision import full_precision


@final
@dataclass(frozen=True)
class DoRA(Transform[Mapping[str, Tensor]]):
    r"""Weight-decomposed low-rank adaptation: LoRA for the direction, a length for each output.

    $$W = m \, \frac{V}{\lVert V \rVert_2}, \qquad V = W_0 + B \operatorname{diag}(s) A$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)` whose rows the norm runs
    over: raw is `{"A": (rank, n), "B": (m, rank), "magnitude": (m,)}`, state `{"base": W_0,
    "scale": s}`, both as in [`LoRA`][funcparam.transforms.LoRA]. Real dtypes. At init `B = 0`
    and the magnitudes are the norms of the value's rows, so every value is kept; a row of zeros
    stays 0.

    The derivative is that of the formula. The paper's section 4.3, and peft, leave the norm out
    of it to save memory, which trains a little differently.

    Args:
        rank: the inner dimension, positive.
        alpha: the numerator of the scale; None takes `rank`, hence scale 1.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions, is not real, or `rank` exceeds a side of its matrix.

    Example:
        >>> import torch
        >>> from funcparam.transforms import DoRA
        >>> raw, state = DoRA(rank=1).right_inverse(torch.tensor([[3.0, 4.0]]))
        >>> raw["magnitude"]
        tensor([5.])
        >>> DoRA(rank=1).forward({**raw, "magnitude": torch.tensor([10.0])}, state)
        tensor([[6., 8.]])

    Source: Liu et al., DoRA, arXiv 2402.09353, equation 5.
    """

    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank <= 0:
            raise ValueError(f"DoRA expects a positive rank; got {self.rank}")

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        delta = (raw["B"] * state["scale"]) @ raw["A"]
        direction = base.flatten(1) + delta.to(base.dtype)
        norm = _row_norms(direction)
        unit = direction / torch.where(norm == 0, 1, norm).unsqueeze(1)
        return (unit * raw["magnitude"].unsqueeze(1).to(base.dtype)).reshape(base.shape)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        factors, state = LoRA(self.rank, self.alpha).right_inverse(value, generator=generator)
        return {**factors, "magnitude": _row_norms(value.flatten(1))}, state

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: what no lengths of the rows can mend is not measured."""
        return value.new_zeros(())

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        LoRA(self.rank, self.alpha).check(value)


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = linalg.vector_norm(matrix, dim=1)
    return norms


@final
@dataclass(frozen=True)
class IA3(Transform[Mapping[str, Tensor]]):
    r"""A frozen weight with one trained factor for each output or input.

    $$W = s \, W_0$$

    For a value with `k` indices along `dim` raw is `{"factor": s}`, `(k,)`; state is
    `{"base": W_0}`. Real and complex. At init `s = 1`, so every value is kept exactly.

    Args:
        dim: the dimension that has a factor for each index: 0 for outputs, 1 for inputs, which
            the paper takes in feed-forward layers.

    Raises:
        ValueError: at `fp.parametrize`, if the value has no dimension `dim`.

    Example:
        >>> import torch
        >>> from funcparam.transforms import IA3
        >>> raw, state = IA3().right_inverse(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> IA3().forward({"factor": torch.tensor([1.0, 10.0])}, state)
        tensor([[ 1.,  2.],
                [30., 40.]])

    Source: Liu et al., arXiv 2205.05638, section 3.3; peft's `IA3Config`.
    """

    dim: int = 0

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        scaled = base.movedim(self.dim, -1) * raw["factor"].to(base.dtype)
        return scaled.movedim(-1, self.dim)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        return {"factor": value.new_ones(value.shape[self.dim])}, {"base": value}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| of `value` that no factors of `base` give. The base is the constraint."""
        if "base" not in state:
            raise ValueError(f"{self!r} expects state with a 'base', which is its constraint")
        rows = value.movedim(self.dim, 0).reshape(value.shape[self.dim], -1)
        base = state["base"].movedim(self.dim, 0).reshape(rows.shape)
        square = (base.conj() * base).real.sum(1)
        factors = (base.conj() * rows).sum(1) / torch.where(square == 0, 1, square)
        return largest(rows - factors.unsqueeze(1) * base)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_dim(self, value, self.dim)
