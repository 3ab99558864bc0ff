from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import (
    INTEGER,
    POSITIVE_NUMBER,
    expect_argument,
    expect_choice,
)
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_dim,
    expect_numbers,
    expect_real,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.numerics.norms import norms


@final
@dataclass(frozen=True)
class Ball(Transform[Tensor]):
    r"""Vectors of at most a given norm: the nearest one to raw.

    $$W = \operatorname{argmin}_{\lVert W \rVert_p \le r} \lVert W - X \rVert_2$$

    Raw has the shape of the value and starts as the value. Of `p = 2` longer vectors are scaled, of
    `p = inf` entries are clamped, and of `p = 1` all entries shrink by a number and those below it
    are 0. State `{"radius"}` holds `r` as a scalar, so that it can be scheduled or swept with
    `vmap`; `radius` here is what init writes there. Real dtypes. A value in the ball is kept; any
    other goes to the nearest one. `rebase` makes the value raw.

    The derivative is that of the projection: what is cut off has none, so an entry that is clamped,
    or is 0 on the ball of `p = 1`, does not train until others bring it back. For a weight that is
    trained by an optimizer a projection after the step is the other way to use it.

    Args:
        p: the norm: 1, 2 or `math.inf`.
        radius: the largest norm, positive.
        dim: the dimension along which the norm is taken; None: the norm is that of the whole
            tensor. -1: rows of a matrix; 0: its columns.

    Raises:
        ValueError: `p` is none of the three or `radius` is not positive; at `fp.parametrize`, if
            the value is not real, has no dimension `dim`, or its dtype has no such radius.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Ball
        >>> raw, state = Ball(1, radius=1.0).right_inverse(torch.tensor([3.0, -2.5, 0.5]))
        >>> Ball(1, radius=1.0).forward(raw, state)
        tensor([ 0.7500, -0.2500,  0.0000])

    Source: Duchi et al., Efficient projections onto the l1-ball for learning in high dimensions,
    ICML 2008, figure 1.
    """

    p: Literal[1, 2] | float = 2
    radius: float = 1.0
    dim: int | None = None

    def __post_init__(self) -> None:
        expect_choice(self, "p", (1, 2, inf))
        expect_argument(self, "radius", POSITIVE_NUMBER)
        expect_argument(self, "dim", INTEGER, optional=True)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        r = state["radius"]
        if self.p == inf:
            return torch.minimum(torch.maximum(raw, -r), r)
        if self.p == 2:
            norm = norms(raw, self._dims(raw))
            return raw * torch.where(norm > r, r / torch.where(norm > r, norm, 1), 1)
        return self._along(raw, lambda X: _nearest_of_the_1_norm(X, r))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value, {"radius": value.new_full((), self.radius)}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.forward(raw, state), state

    def project(self, value: Tensor, state: State) -> Tensor:
        return self.forward(value, state)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the largest norm is above the radius; one in state counts if given."""
        if not value.numel():
            return value.sum()
        dims = self._dims(value)
        size = value.abs()
        if self.p == 2:
            norm = norms(value, dims)
        else:
            norm = size.amax(dims) if self.p == inf else size.sum(dims)
        return largest((norm - state.get("radius", self.radius)).clamp_min(0))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: what is outside of the ball is lost, so its"
            " Jacobian is singular"
        )

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_numbers(self, value.dtype, radius=self.radius)
        if self.dim is not None:
            expect_dim(self, value, self.dim)

    def _dims(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(range(tensor.ndim)) if self.dim is None else (self.dim,)

    def _along(self, X: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function of vectors along `dim`, or of the whole tensor."""
        if self.dim is None:
            return function(X.flatten()).reshape(X.shape)
        return function(X.movedim(self.dim, -1)).movedim(-1, self.dim)


def _nearest_of_the_1_norm(X: Tensor, radius: Tensor) -> Tensor:
    """All entries shrink by the number that makes their sum the radius, if that is exceeded.

    Sizes are taken from the largest one down, which is exact where they are near to it: of large
    entries what is left would round away.
    """
    if not X.numel():
        return X
    size = X.abs()
    top = size.detach().amax(-1, keepdim=True)
    below = size - top
    ordered = below.sort(-1, descending=True).values
    k = torch.arange(1, size.shape[-1] + 1, dtype=size.dtype, device=size.device)
    shrinks = (ordered.cumsum(-1) - radius) / k
    count = (ordered > shrinks).sum(-1, keepdim=True)
    shrunk = (below - shrinks.gather(-1, (count - 1).clamp_min(0))).clamp_min(0)
    return torch.where(size.sum(-1, keepdim=True) > radius, X.sign() * shrunk, X)
