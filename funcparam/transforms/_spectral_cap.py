from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

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
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.orthogonal_maps import identity_like
from funcparam.transforms.numerics.polar import polar_factor


@final
@dataclass(frozen=True)
class SpectralCap(Transform[Tensor]):
    r"""Matrices whose singular values are at most a bound: larger ones are cut, the others stay.

    $$W = U \operatorname{diag}(\min(S, c)) V^H, \qquad X = U \operatorname{diag}(S) V^H$$

    Raw has the shape of the value, `(..., m, n)`, and starts as the value. State `{"cap"}` holds
    `c` as a scalar, so that it can be scheduled or swept with `vmap`; `cap` here is what init
    writes there. Real and complex. A value whose singular values are at most `cap` is kept; any
    other goes to the nearest such matrix in the Frobenius norm. `rebase` makes the value raw, so
    that what was cut is forgotten: above the bound a singular value has no gradient.

    There is no decomposition: with `Y = X / c`, its polar factor `Q` and the sign `J` of
    `I - Q^H Y`, `2 W = c (2 Q + (Y - Q) (I + J))`, where both are found by products, as in
    `Orthogonal("newton_schulz")`. So equal singular values do no harm in derivatives. Singular
    values within 1e-5 of the bound may stay that far above it. Where `X` is large, the value has
    the rounding of the whole, `eps |X|`, and above a `|X|` of 1e5 `c` the bound does not hold.

    Args:
        cap: the largest singular value, positive.

    Raises:
        ValueError: `cap` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions, or its dtype has no such number.

    Example:
        >>> import torch
        >>> from funcparam.transforms import SpectralCap
        >>> raw, state = SpectralCap(2.0).right_inverse(torch.diag(torch.tensor([5.0, 1.0])))
        >>> SpectralCap(2.0).forward(raw, state).round(decimals=4)
        tensor([[2., 0.],
                [0., 1.]])

    Source: Newhouse et al., Training transformers with enforced Lipschitz constants,
    arXiv 2507.13338 (spectral cap); Amsel et al., The Polar Express, arXiv 2505.16932.
    """

    cap: float

    def __post_init__(self) -> None:
        expect_argument(self, "cap", POSITIVE_NUMBER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        wide = raw.shape[-2] < raw.shape[-1]
        Y = (raw.mH if wide else raw) / state["cap"]
        # nothing is cut if all entries have no larger norm; products would round small ones away
        kept = linalg.matrix_norm(Y.detach(), keepdim=True) <= 1
        Y = torch.where(kept, 0, Y)
        identity = identity_like(Y[..., :1, :].mH @ Y[..., :1, :])
        Q = polar_factor(Y)
        S = Q.mH @ Y
        # 1 - s and (1 - s) / (1 + s) have one sign, and the latter is in [-1, 1] however large s is
        inverse, _ = cast("tuple[Tensor, Tensor]", linalg.inv_ex(identity + (S + S.mH) / 2))
        # at s = 1 the sign of what is left would be that of its rounding
        some = 16 * torch.finfo(raw.dtype).eps
        sign = polar_factor(2 * inverse - (1 - some) * identity)
        below = (identity + sign) / 2
        # twice, since once leaves of a large s its rounding
        W = (Q + (Y - Q) @ below @ below) * state["cap"]
        return torch.where(kept, raw, W.mH if wide else W)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value, {"cap": value.real.new_full((), self.cap)}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.forward(raw, state), state

    def project(self, value: Tensor, state: State) -> Tensor:
        return self.forward(value, state)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the largest singular value is above the bound; one in state counts if given."""
        spectrum = cast("Tensor", linalg.svdvals(value))
        return largest((spectrum - state.get("cap", self.cap)).clamp_min(0))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: what is above the bound is lost, so its"
            " Jacobian is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_numbers(self, value.dtype, cap=self.cap)
