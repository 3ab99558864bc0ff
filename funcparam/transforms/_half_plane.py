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
from funcparam.transforms.numerics.inside import least_positive


@final
@dataclass(frozen=True)
class LeftHalfPlane(Transform[Mapping[str, Tensor]]):
    r"""Complex numbers of negative real part: the diagonal of a stable system in continuous time.

    $$\lambda = -e^a + i \omega$$

    Raw is `{"log_decay": a, "frequency": omega}`, both real and of the shape of $\lambda$. The
    value is complex, or, with `pairs`, real with a last dimension of 2 for real and imaginary part,
    as in `torch.view_as_real`. Every value of negative real part is kept. In float32 `a` beyond 88
    overflows. No real part vanishes: it is at least the least normal number in size. The
    log-determinant is over real and imaginary parts: the sum of `a`.

    It starts from the value, so where a model shall start is what is written there before: see
    Starts of state spaces, in the page Transforms.
    [`StableDiagonal`][funcparam.transforms.StableDiagonal] is for discrete time.

    Args:
        pairs: whether the value holds pairs of real numbers instead of complex ones.

    Raises:
        ValueError: at `fp.parametrize`, if the value is not complex, or with `pairs` not real
            with a last dimension of 2; at init, if a real part is not negative.

    Example:
        >>> import torch
        >>> from funcparam.transforms import LeftHalfPlane
        >>> raw, state = LeftHalfPlane().right_inverse(torch.tensor([-0.5 + 3.0j]))
        >>> LeftHalfPlane().forward({**raw, "frequency": torch.tensor([7.0])}, state)
        tensor([-0.5000+7.j])

    Source: Gu et al., On the parameterization and initialization of diagonal state space models
    (S4D), arXiv 2206.11893, section 3.3; Smith et al., S5, arXiv 2208.04933.
    """

    roles: ClassVar[Mapping[str, Role]] = {"log_decay": "coordinates", "frequency": "coordinates"}

    pairs: bool = False

    def __post_init__(self) -> None:
        expect_choice(self, "pairs", (True, False))

    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return self._forward(raw, state, torch.finfo(raw["log_decay"].dtype))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        re, im = self._parts(value)
        expect_all(self, re < 0, "expects every real part to be negative; shift the value first")
        return {"log_decay": (-re).log(), "frequency": im.clone()}, {}

    def project(self, value: Tensor, state: State) -> Tensor:
        """A real part that is not negative becomes the largest normal number that is."""
        re, im = self._parts(value)
        return self._value(re.clamp_max(-torch.finfo(re.dtype).tiny), im)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return vector

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """How far the largest real part is above 0."""
        return largest(self._parts(value)[0].clamp_min(0))

    @full_precision
    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return raw["log_decay"].sum()

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return None

    def check(self, value: Tensor) -> None:
        if not self.pairs:
            if not value.is_complex():
                raise ValueError(
                    f"{self!r} expects a complex tensor; got {value.dtype}."
                    " LeftHalfPlane(pairs=True) takes real ones with a last dimension of 2"
                )
            return
        expect_real(self, value)
        if value.ndim == 0 or value.shape[-1] != 2:
            raise ValueError(
                f"{self!r} expects real and imaginary part in a last dimension of 2;"
                f" got shape {tuple(value.shape)}"
            )

    @full_precision
    def _forward(self, raw: Mapping[str, Tensor], state: State, rounded_to: torch.finfo) -> Tensor:
        decay = raw["log_decay"].exp()
        decay = decay.clamp_min(least_positive(decay.dtype, rounded_to))
        return self._value(-decay, raw["frequency"])

    def _value(self, re: Tensor, im: Tensor) -> Tensor:
        return torch.stack([re, im], dim=-1) if self.pairs else torch.complex(re, im)

    def _parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return (value[..., 0], value[..., 1]) if self.pairs else (value.real, value.imag)
