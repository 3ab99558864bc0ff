from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_filled, expect_matrix
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.orthogonal_maps import cayley_turn


@final
@dataclass(frozen=True)
class BOFT(Transform[Mapping[str, Tensor]]):
    r"""Orthogonal butterfly finetuning: inputs turned block by block, in several arrangements.

    $$W = \operatorname{diag}(s) \, W_0 \, T_0^H \cdots T_{f-1}^H, \qquad
    T_i = P_i \operatorname{diag}(Q_{i1}, \dots, Q_{ik}) P_i^H$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`: raw is `{"R": (factors,
    n / block_size, block_size, block_size), "s": (m,)}`, where `Q` is the Cayley transform of `R`
    as in [`OFT`][funcparam.transforms.OFT]; state is `{"base": W_0}`. `P_i` deals out half blocks,
    `2^i` blocks apart, so that with `log2(n / block_size) + 1` factors every input reaches every
    other. Real and complex. At init `R = 0` and `s = 1`, so every value is kept. `rebase` moves the
    base to the current value. The violation is not measured, and is NaN.

    Args:
        block_size: the side of a block, positive; even if there are several factors.
        factors: the number of arrangements, positive; peft's `boft_n_butterfly_factor`.

    Raises:
        ValueError: `block_size` or `factors` is not positive; at `fp.parametrize`, if the value has
            fewer than two dimensions, or `block_size * 2^(factors - 1)` does not divide its inputs.

    Example:
        >>> import torch
        >>> from funcparam.transforms import BOFT
        >>> raw, state = BOFT(block_size=2, factors=2).right_inverse(torch.ones(1, 4))
        >>> W = BOFT(2, 2).forward({**raw, "R": raw["R"] + 1}, state)
        >>> torch.allclose(W.norm(), torch.tensor(2.0))
        True

    Source: Liu et al., BOFT, arXiv 2311.06243, equations 3 to 6; peft's `BOFTConfig`.
    """

    is_adapter: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = {"R": "relative", "s": "magnitude"}

    block_size: int
    factors: int = 1

    def __post_init__(self) -> None:
        expect_argument(self, "block_size", POSITIVE_INTEGER)
        expect_argument(self, "factors", POSITIVE_INTEGER)
        if self.factors > 1 and self.block_size % 2:
            raise ValueError(
                f"BOFT expects block_size to be even with several factors; got {self.block_size}"
            )

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        turns = cayley_turn(raw["R"]).to(base.dtype)
        matrix = base.flatten(1)
        for i in range(self.factors):
            blocks = self._dealt(matrix, i)  # (m, n / block_size, block_size)
            turned = torch.einsum("mbj,bkj->mbk", blocks, turns[i].conj())
            matrix = self._gathered(turned, i)
        return (raw["s"].unsqueeze(1).to(base.dtype) * matrix).reshape(base.shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        m, n = value.flatten(1).shape
        b = self.block_size
        R = value.new_zeros(self.factors, n // b, b, b)
        return {"R": R, "s": value.new_ones(m)}, {"base": value}

    @full_precision
    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        return self.right_inverse(self.forward(raw, state))

    def violation(self, value: Tensor, state: State) -> Tensor:
        """NaN: it is not measured."""
        return value.real.new_full((), torch.nan)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value.flatten(1))
        needed = self.block_size * 2 ** (self.factors - 1)
        if value.flatten(1).shape[1] % needed:
            raise ValueError(
                f"{self!r} expects a number of inputs that {needed} divides;"
                f" got shape {tuple(value.shape)}, as a matrix {tuple(value.flatten(1).shape)}"
            )

    def _dealt(self, matrix: Tensor, i: int) -> Tensor:
        """The columns as blocks: half from the first and half from the second of each group."""
        m, n = matrix.shape
        if i > 0:
            halves = matrix.reshape(m, -1, 2, 2**i, self.block_size // 2)
            matrix = halves.transpose(2, 3)
        return matrix.reshape(m, n // self.block_size, self.block_size)

    def _gathered(self, blocks: Tensor, i: int) -> Tensor:
        """The inverse of `_dealt`."""
        m = len(blocks)
        if i > 0:
            blocks = blocks.reshape(m, -1, 2**i, 2, self.block_size // 2).transpose(2, 3)
        return blocks.reshape(m, -1)
