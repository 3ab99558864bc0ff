from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import (
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    expect_argument,
)
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_all,
    expect_real,
    expect_square,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role


@final
@dataclass(frozen=True)
class DoublyStochastic(Transform[Tensor]):
    r"""Matrices of entries that are not negative, whose rows and columns sum to 1.

    $$W = R(S^k(X / \tau)), \qquad S: \; L \leftarrow L - \operatorname{logsumexp}_j L, \quad
    L \leftarrow L - \operatorname{logsumexp}_i L$$

    Raw has the shape of the value, `(..., n, n)`, and holds logarithms. `k` steps of Sinkhorn's
    iteration scale rows and columns; `R` takes the exponential and rounds it to the constraint:
    rows, then columns, that sum to more than 1 are divided by their sum, and a matrix of rank 1
    adds what is missing. So the sums are 1 to rounding for every raw, however far from converged
    the iteration is. Real dtypes.

    A doubly stochastic value is kept: raw is its logarithm, with zeros as the least normal
    number. Any other value that is not negative goes to the limit of Sinkhorn's iteration, the
    nearest doubly stochastic matrix in relative entropy, as far as the steps reach.

    `forward(logits, {})` takes any logits `(..., n, n)`, those that a layer computes from its input
    too, as the hyper-connections of mHC do.

    Args:
        iterations: the number of steps `k`, positive. The closer `exp(X / temperature)` is to a
            permutation, the more are needed to converge.
        temperature: what logits are divided by, positive. A low one is near to a permutation.

    Raises:
        ValueError: `iterations` or `temperature` is not positive; at `fp.parametrize`, if the
            value is not square or not real; at init, if an entry is negative.

    Example:
        >>> import torch
        >>> from funcparam.transforms import DoublyStochastic
        >>> DoublyStochastic().forward(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), {})
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])

    Source: Mena et al., Learning latent permutations with Gumbel-Sinkhorn networks,
    arXiv 1802.08665, section 2; Altschuler et al., arXiv 1705.09634, algorithm 2 (rounding); Xie et
    al., mHC: Manifold-constrained hyper-connections, arXiv 2512.24880 (on activations).
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "coordinates"}

    iterations: int = 20
    temperature: float = 1.0

    def __post_init__(self) -> None:
        expect_argument(self, "iterations", POSITIVE_INTEGER)
        expect_argument(self, "temperature", POSITIVE_NUMBER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        logs = raw if self.temperature == 1 else raw / self.temperature
        for _ in range(self.iterations):
            logs = logs - logs.logsumexp(-1, keepdim=True)
            logs = logs - logs.logsumexp(-2, keepdim=True)
        return _rounded(logs.exp())

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        expect_all(
            self, value >= 0, "expects no negative entry; clamp the value or exponentiate it first"
        )
        return self._logs(value), {}

    @full_precision
    def project(self, value: Tensor, state: State) -> Tensor:
        """Entries that are not positive become the smallest normal number, and the rest follows."""
        return self.forward(self._logs(value), state)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        """What leaves the sums of rows and columns: `vector` with the means of both taken off."""
        off_rows = vector - vector.mean(-1, keepdim=True)
        return off_rows - off_rows.mean(-2, keepdim=True)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """The largest |row sum - 1|, |column sum - 1| or -entry."""
        rows, columns = largest(value.sum(-1) - 1), largest(value.sum(-2) - 1)
        return torch.stack([rows, columns, largest(value.clamp_max(0))]).amax()

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: factors of rows and columns are lost, so its"
            " Jacobian is singular"
        )

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_square(self, value)

    def _logs(self, value: Tensor) -> Tensor:
        return value.clamp_min(torch.finfo(value.dtype).tiny).log() * self.temperature


def _rounded(plan: Tensor) -> Tensor:
    """Bring row and column sums to 1."""
    plan = plan / plan.sum(-1, keepdim=True).clamp_min(1)
    plan = plan / plan.sum(-2, keepdim=True).clamp_min(1)
    rows = (1 - plan.sum(-1, keepdim=True)).clamp_min(0)
    columns = (1 - plan.sum(-2, keepdim=True)).clamp_min(0)
    missing = rows.sum(-2, keepdim=True).clamp_min(torch.finfo(plan.dtype).eps)
    return plan + rows * (columns / missing)
