from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import (
    INTEGER,
    POSITIVE_INTEGER,
    Kind,
    expect_argument,
)
from funcparam.transforms.contract.base import (
    AnyTransform,
    State,
    Transform,
    expect_dim,
    expect_real,
    largest,
)
from funcparam.transforms.contract.precision import full_precision

_FRACTION = Kind("a number above 0 and at most 1", (int, float), lambda x: 0 < x <= 1)


@final
@dataclass(frozen=True)
class TopK(Transform[Tensor]):
    r"""The largest entries of a tensor, and zeros elsewhere, chosen anew at every evaluation.

    $$W_i = X_i \, [\lvert X_i \rvert \text{ is among the largest } k]$$

    Raw has the shape of the value. `k` is the given fraction of the entries, rounded, and at least
    1. Real dtypes. A value with at most `k` nonzero entries is kept; any other goes to the nearest
    one.

    The derivative is straight through, that of `W = X`, so that what is cut off can come back. To
    draw it towards 0, as SR-STE does, add `decay / 2 * (raw - value.detach()).square().sum()` to
    the loss. A choice that stays is that of [`Mask`][funcparam.transforms.Mask] or
    [`Sparse`][funcparam.transforms.Sparse].

    Args:
        fraction: how much of the entries stays, above 0 and at most 1.

    Raises:
        ValueError: `fraction` is not in (0, 1]; at `fp.parametrize`, if the value is not real.

    Example:
        >>> import torch
        >>> from funcparam.transforms import TopK
        >>> TopK(0.5).forward(torch.tensor([3.0, -4.0, 1.0, 2.0]), {})
        tensor([ 3., -4.,  0.,  0.])

    Source: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878 (magnitudes); Bengio et al.,
    arXiv 1308.3432 (straight through).
    """

    fraction: float

    def __post_init__(self) -> None:
        expect_argument(self, "fraction", _FRACTION)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return _straight_through(self._largest(raw), raw)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value, {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| that would be cut off."""
        return largest(value - self._largest(value))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(_cut(self))

    def check(self, value: Tensor) -> None:
        expect_real(self, value)

    def _largest(self, X: Tensor) -> Tensor:
        kept = max(1, round(self.fraction * X.numel()))
        return _keep(X.flatten(), kept).reshape(X.shape)


@final
@dataclass(frozen=True)
class NMSparse(Transform[Tensor]):
    r"""N of every M neighbours stay, the largest, as hardware for sparse matrices asks for.

    $$W_i = X_i \, [\lvert X_i \rvert \text{ is among the largest } n \text{ of its group of } m]$$

    Raw has the shape of the value. Groups are `m` neighbours along `dim`. Real dtypes. A value with
    at most `n` nonzero entries in each is kept; any other goes to the nearest one. The derivative
    is straight through, as of [`TopK`][funcparam.transforms.TopK], which says how to add the decay
    of SR-STE.

    Args:
        n: how many stay, positive.
        m: of how many, at least `n`.
        dim: the dimension of the groups: -1, the inputs of a Linear.

    Raises:
        ValueError: `n` or `m` is not positive, or `n` exceeds `m`; at `fp.parametrize`, if the
            value is not real or has no dimension `dim` that `m` divides.

    Example:
        >>> import torch
        >>> from funcparam.transforms import NMSparse
        >>> NMSparse(2, 4).forward(torch.tensor([3.0, -4.0, 1.0, 2.0]), {})
        tensor([ 3., -4.,  0.,  0.])

    Source: Zhou et al., Learning N:M fine-grained structured sparse neural networks from scratch,
    arXiv 2102.04010 (SR-STE); Mishra et al., arXiv 2104.08378 (2:4).
    """

    n: int = 2
    m: int = 4
    dim: int = -1

    def __post_init__(self) -> None:
        expect_argument(self, "n", POSITIVE_INTEGER)
        expect_argument(self, "m", POSITIVE_INTEGER)
        expect_argument(self, "dim", INTEGER)
        if self.n > self.m:
            raise ValueError(f"NMSparse expects n to be at most m; got n={self.n}, m={self.m}")

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return _straight_through(self._largest(raw), raw)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value, {}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| that would be cut off."""
        return largest(value - self._largest(value))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(_cut(self))

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_dim(self, value, self.dim)
        if value.shape[self.dim] % self.m:
            raise ValueError(
                f"{self!r} expects a size along dim {self.dim} that {self.m} divides;"
                f" got shape {tuple(value.shape)}"
            )

    def _largest(self, X: Tensor) -> Tensor:
        last = X.movedim(self.dim, -1)
        groups = last.reshape(*last.shape[:-1], last.shape[-1] // self.m, self.m)
        return _keep(groups, self.n).reshape(last.shape).movedim(-1, self.dim)


def _keep(X: Tensor, count: int) -> Tensor:
    """The largest entries along the last dimension, of equal ones the first."""
    order = X.detach().abs().sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(X, dtype=torch.bool)
    kept = kept.scatter(-1, order[..., :count], torch.ones_like(kept))
    return torch.where(kept, X, 0)


def _straight_through(value: Tensor, like: Tensor) -> Tensor:
    """`value` to the last bit, with the derivative of `like`."""
    return value.detach() + (like - like.detach())


def _cut(transform: AnyTransform) -> str:
    return f"{transform!r} has no log_abs_det_jacobian: what is cut off is lost"
