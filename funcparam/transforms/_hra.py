from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms._adapters import OFT
from funcparam.transforms.contract.arguments import Kind, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_filled, expect_matrix
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.norms import directions

_EVEN = Kind("an even positive integer", (int,), lambda n: n > 0 and n % 2 == 0)


@final
@dataclass(frozen=True)
class HRA(Transform[Tensor]):
    r"""Householder reflection adaptation: a frozen weight whose inputs are reflected a few times.

    $$W = W_0 \prod_{i=1}^{r} \left(I - 2 \frac{u_i u_i^H}{\lVert u_i \rVert^2}\right)$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`: raw has the `u_i` as columns,
    `(n, rank)`; state is `{"base": W_0}`. Real and complex. At init the `u_i` are equal in pairs,
    whose reflections cancel, so every value is kept; they are drawn from `generator` or torch's
    default one. `rebase` moves the base to the current value and pairs them again. The inner
    products of the outputs stay as they are. A column of zeros reflects nothing.

    Args:
        rank: the number of reflections, positive and even.

    Raises:
        ValueError: `rank` is not positive and even; at `fp.parametrize`, if the value has fewer
            than two dimensions.

    Example:
        >>> import torch
        >>> from funcparam.transforms import HRA
        >>> raw, state = HRA(rank=2).right_inverse(torch.tensor([[3.0, 4.0]]))
        >>> u = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
        >>> HRA(rank=2).forward(u, state)
        tensor([[-3., -4.]])

    Source: Yuan et al., Bridging the gap between low-rank and orthogonal adaptation via
    Householder reflection adaptation, arXiv 2405.17484, equation 4; peft's `HRAConfig` without its
    orthogonalisation.
    """

    is_adapter: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, Role]] = {"": "direction"}

    rank: int

    def __post_init__(self) -> None:
        expect_argument(self, "rank", _EVEN)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        base = state["base"]
        W = base.flatten(1)
        U = directions(raw, (0,)).to(W.dtype)
        # the product in the UT form, as in numerics/orthogonal_maps.py
        gram = U.mH @ U
        S = gram.triu(1) + torch.eye(self.rank, dtype=W.dtype, device=W.device) / 2
        turned = W - (W @ U) @ linalg.solve_triangular(S, U.mH, upper=True)
        return turned.reshape(base.shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        shape = (value.flatten(1).shape[1], self.rank // 2)
        half = torch.randn(shape, generator=generator, dtype=value.dtype, device=value.device)
        return half.repeat_interleave(2, dim=1), {"base": value}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return raw[:, ::2].repeat_interleave(2, dim=1), {"base": self.forward(raw, state)}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest distance of an entry from the nearest turned base, which is necessary only."""
        if "base" not in state:
            raise ValueError(f"{self!r} expects state with a 'base', which is its constraint")
        return OFT(blocks=1).violation(value, state)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value.flatten(1))
