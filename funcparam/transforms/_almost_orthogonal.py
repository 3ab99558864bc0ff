from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import POSITIVE_NUMBER, expect_argument
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_matrix,
    expect_numbers,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.frames import (
    at_frames,
    between_frames,
    svd,
    with_exact_bases,
    with_moved_bases,
)
from funcparam.transforms.numerics.linalg import linalg

# At the bound itself the sine has no slope, and a singular value would never leave it.
_INSIDE = 0.99


@final
@dataclass(frozen=True)
class AlmostOrthogonal(Transform[Mapping[str, Tensor]]):
    r"""Matrices whose singular values are all within `lam` of 1.

    $$W = U \operatorname{diag}(1 + \lambda \sin S) V^H$$

    For a value of shape `(..., m, n)` and its shorter side `k` raw is `{"U": (..., m, k),
    "S": (..., k), "V": (..., n, k)}`, with a real `S`. `U` and `V` are directions in which two
    orthonormal frames, state `{"base_U", "base_V"}`, are moved as
    [`Stiefel`][funcparam.transforms.Stiefel] does. State `{"lam"}` holds the radius as a scalar,
    so that it can be scheduled or swept with `vmap`; `lam` here is what init writes there. The
    sine reaches both bounds at finite raw.

    Real and complex. A value of this kind is kept. Any other has those singular values that are
    outside put to `0.99 lam` from 1, on their side: on the bound itself they would get no
    gradient. `rebase` moves the base points.

    Args:
        lam: the radius, in (0, 1]. For 0 there is [`Orthogonal`][funcparam.transforms.Orthogonal].

    Raises:
        ValueError: `lam` is not in (0, 1]; at `fp.parametrize`, if the value has fewer than two
            dimensions, or its dtype has no such number.

    Example:
        >>> import torch
        >>> from funcparam.transforms import AlmostOrthogonal
        >>> transform = AlmostOrthogonal(lam=0.5)
        >>> raw, state = transform.right_inverse(torch.diag(torch.tensor([1.25, 3.0])))
        >>> torch.linalg.svdvals(transform.forward(raw, state))
        tensor([1.4950, 1.2500])
        >>> raw["S"] = torch.full((2,), 100.0)
        >>> transform.violation(transform.forward(raw, state), state) < 1e-6
        tensor(True)

    Source: geotorch's `AlmostOrthogonal`, whose default map is this one.
    """

    roles: ClassVar[Mapping[str, Role]] = {"U": "relative", "V": "relative", "S": "coordinates"}

    lam: float

    def __post_init__(self) -> None:
        expect_argument(self, "lam", POSITIVE_NUMBER)
        if self.lam > 1:
            raise ValueError(f"AlmostOrthogonal expects lam to be at most 1; got {self.lam}")

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return between_frames(raw, 1 + state["lam"] * raw["S"].sin(), state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        U, spectrum, Vh = svd(value)
        lam = spectrum.new_full((), self.lam)
        raw, state = at_frames(U, _offset(spectrum, lam, value).asin(), Vh)
        return raw, {**state, "lam": lam}

    @full_precision
    def refresh(self, raw: Mapping[str, Tensor], state: State) -> State:
        return with_exact_bases(state)

    @full_precision
    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        return with_moved_bases(raw, state)

    @full_precision
    def project(self, value: Tensor, state: State) -> Tensor:
        """Singular values that are outside go inside; the radius is that in state."""
        U, spectrum, Vh = svd(value)
        spectrum = 1 + state["lam"] * _offset(spectrum, state["lam"], value)
        return (U * spectrum.unsqueeze(-2).to(U.dtype)) @ Vh

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the farthest singular value is outside; a radius in state counts if given."""
        spectrum: Tensor = linalg.svdvals(value)
        return largest(((spectrum - 1).abs() - state.get("lam", self.lam)).clamp_min(0))

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_numbers(self, value.dtype, lam=self.lam)


def _offset(spectrum: Tensor, lam: Tensor, value: Tensor) -> Tensor:
    """Where between the bounds, at -1 and 1, singular values go."""
    offset = (spectrum - 1) / lam
    rounding = max(value.shape[-2:]) * torch.finfo(spectrum.dtype).eps * 4 / lam
    inside = offset.abs() <= 1 + rounding
    return torch.where(inside, offset.clamp(-1, 1), _INSIDE * offset.sign())
