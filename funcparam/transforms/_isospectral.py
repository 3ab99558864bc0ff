from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import State, Transform, expect_matrix, largest
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


@final
@dataclass(frozen=True)
class Isospectral(Transform[Mapping[str, Tensor]]):
    r"""Matrices that keep the singular values of the start, and train their singular vectors.

    $$W = U \operatorname{diag}(s) V^H$$

    For a value of shape `(..., m, n)` and its shorter side `k` raw is `{"U": (..., m, k), "V":
    (..., n, k)}`, directions in which two orthonormal frames, state `{"base_U", "base_V"}`, are
    moved as [`Stiefel`][funcparam.transforms.Stiefel] does; state `{"s"}` has the singular values,
    `(..., k)`. Write others there to change them: `0` drops a rank. Real and complex. Every value
    is kept. `rebase` moves the base points. With trained singular values there are
    [`FixedRank`][funcparam.transforms.FixedRank] and
    [`AlmostOrthogonal`][funcparam.transforms.AlmostOrthogonal].

    Raises:
        ValueError: at `fp.parametrize`, if the value has fewer than two dimensions.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Isospectral
        >>> raw, state = Isospectral().right_inverse(torch.diag(torch.tensor([5.0, 1.0])))
        >>> raw = {name: X + 1 for name, X in raw.items()}
        >>> torch.linalg.svdvals(Isospectral().forward(raw, state)).round(decimals=4)
        tensor([5., 1.])

    Source: Isospectral optimization (ISO), arXiv 2607.19331.
    """

    roles: ClassVar[Mapping[str, Role]] = {"U": "relative", "V": "relative"}

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return between_frames(raw, state["s"], state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        U, s, Vh = svd(value)
        raw, state = at_frames(U, s, Vh)
        return {"U": raw["U"], "V": raw["V"]}, {**state, "s": s}

    @full_precision
    def refresh(self, raw: Mapping[str, Tensor], state: State) -> State:
        return with_exact_bases(state)

    @full_precision
    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        return with_moved_bases(raw, state)

    @full_precision
    def project(self, value: Tensor, state: State) -> Tensor:
        raw, own = self.right_inverse(value)
        return self.forward(raw, {**own, "s": _ordered(state["s"])})

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest distance of a singular value from that in state, which is the constraint."""
        if "s" not in state:
            raise ValueError(f"{self!r} expects state with an 's', which is its constraint")
        spectrum = cast("Tensor", linalg.svdvals(value))
        return largest(spectrum - _ordered(state["s"]))

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: matrices of given singular values are a"
            " manifold, on which only a volume element exists"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)


def _ordered(s: Tensor) -> Tensor:
    """As singular values are: in state others may be written, and of any sign."""
    return s.abs().sort(descending=True).values
