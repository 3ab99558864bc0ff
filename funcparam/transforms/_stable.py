from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import expect_choice
from funcparam.transforms.contract.base import State, Transform, expect_all, expect_real, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role

# exp(-exp(nu)) is 0 above this in every dtype; the gradient is 0 and not 0 * inf
_GONE_ABOVE = 10.0


@final
@dataclass(frozen=True)
class StableDiagonal(Transform[Mapping[str, Tensor]]):
    r"""Complex numbers inside the unit circle: the diagonal of a stable linear recurrence.

    $$\lambda = \exp(-e^\nu + i \theta), \qquad |\lambda| = \exp(-e^\nu) < 1$$

    Raw is `{"nu", "theta"}`, both real and of the shape of $\lambda$. The value is complex, or,
    with `pairs`, real with a last dimension of 2 for real and imaginary part, as in
    `torch.view_as_real`: for code that keeps its parameters real.

    Every value with $0 < |\lambda| < 1$ is kept. Near the circle $|\lambda|$ rounds to 1 below
    `nu` of about -16 in float32 (-36 in float64). The log-determinant is over real and imaginary
    parts: the sum of $\nu - 2 e^\nu$.

    Args:
        pairs: whether the value holds pairs of real numbers instead of complex ones.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not complex, or with `pairs` not real
            with a last dimension of 2; at init, if a modulus is 0 or not below 1.

    Example:
        >>> import torch
        >>> from funcparam.transforms import StableDiagonal
        >>> raw, state = StableDiagonal().right_inverse(torch.tensor([0.6 + 0.3j]))
        >>> StableDiagonal().forward(raw, state)
        tensor([0.6000+0.3000j])

    Source: Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences,
    arXiv 2303.06349, section 3.3.
    """

    roles: ClassVar[Mapping[str, Role]] = {"nu": "coordinates", "theta": "coordinates"}

    pairs: bool = False

    def __post_init__(self) -> None:
        expect_choice(self, "pairs", (True, False))

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        modulus = (-raw["nu"].clamp_max(_GONE_ABOVE).exp()).exp()
        return self._value(modulus * raw["theta"].cos(), modulus * raw["theta"].sin())

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        re, im = self._parts(value)
        modulus = torch.hypot(re, im)
        expect_all(
            self,
            (modulus > 0) & (modulus < 1),
            "expects every modulus strictly between 0 and 1; scale the value first",
        )
        return {"nu": (-modulus.log()).log(), "theta": torch.atan2(im, re)}, {}

    def project(self, value: Tensor, state: State) -> Tensor:
        """What is not inside of the circle goes next to it, and 0 to the least normal number."""
        re, im = self._parts(value)
        modulus, limits = torch.hypot(re, im), torch.finfo(re.dtype)
        scale = torch.where(modulus < 1, 1, (1 - 4 * limits.eps) / modulus)
        return self._value(torch.where(modulus == 0, limits.tiny, re * scale), im * scale)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the largest modulus is above 1."""
        return largest((torch.hypot(*self._parts(value)) - 1).clamp_min(0))

    @full_precision
    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return (raw["nu"] - 2 * raw["nu"].exp()).sum()

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return None

    def check(self, value: Tensor) -> None:
        if not self.pairs:
            if not value.is_complex():
                raise ValueError(
                    f"{self!r} expects a complex tensor; got {value.dtype}."
                    " StableDiagonal(pairs=True) takes real ones with a last dimension of 2"
                )
            return
        expect_real(self, value)
        if value.ndim == 0 or value.shape[-1] != 2:
            raise ValueError(
                f"{self!r} expects real and imaginary part in a last dimension of 2;"
                f" got shape {tuple(value.shape)}"
            )

    def _value(self, re: Tensor, im: Tensor) -> Tensor:
        return torch.stack([re, im], dim=-1) if self.pairs else torch.complex(re, im)

    def _parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return (value[..., 0], value[..., 1]) if self.pairs else (value.real, value.imag)
