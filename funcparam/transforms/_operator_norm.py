from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, expect_real
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.kernels import expect_groups, fft, grouped
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.top_singular_value import top_singular_value


@final
@dataclass(frozen=True)
class OperatorNorm(Transform[Tensor]):
    r"""Kernels divided by the spectral norm of their convolution, not of a reshaped matrix.

    $$W = \frac{X}{\sigma(X)}, \qquad
    \sigma(X) = \max_\omega \Big\lVert \sum\nolimits_t X_t e^{-i \omega t} \Big\rVert_2$$

    over the frequencies of a torus whose sides are `samples` times the kernel's. That is the
    largest singular value of the convolution with circular padding on inputs of that size, as
    [`SpectralNorm`][funcparam.transforms.SpectralNorm] of the reshaped kernel is not: for a kernel
    of `k` taps that is off by up to `sqrt(k)`. On inputs of other sizes, and with zero padding, the
    norm is at most `(1 - 2 / samples)^(-1/4)` for each dimension: 1.19 of the default 4, 1.07 of 8.
    A stride does not add to it. Circular padding of more than `dilation * (k - 1)` entries in all
    along an axis, and reflected or replicated padding, repeat entries, and the norm may be larger.

    Raw is a kernel `(out, in / groups, *taps)`, as the value, and starts as it. There is no state:
    each evaluation takes a Fourier transform and the singular values at all frequencies. Real
    dtypes. A value of norm 1 is kept, any other is divided by its norm, and zero stays zero.
    `rebase` makes the value raw. [`AOL`][funcparam.transforms.AOL] is a bound that costs less.

    Args:
        samples: how many frequencies there are for each tap, in each dimension; more than 2.
        groups: the convolution's `groups`.

    Raises:
        ValueError: `samples` is not above 2 or `groups` not positive; at `fp.parametrize`, if the
            value is not a real kernel, or `groups` does not divide its outputs.

    Example:
        >>> import torch
        >>> from funcparam.transforms import OperatorNorm
        >>> blur = torch.ones(1, 1, 3, 3)
        >>> OperatorNorm().forward(blur, {}).sum()
        tensor(1.)

    Source: Sedghi, Gupta and Long, The singular values of convolutional layers, arXiv 1805.10408;
    Pfister and Bresler, Bounding multivariate trigonometric polynomials, IEEE Trans. Signal
    Process. 67 (2019) (other sizes); Delattre et al., arXiv 2305.16173.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "direction"}

    samples: int = 4
    groups: int = 1

    def __post_init__(self) -> None:
        expect_argument(self, "samples", POSITIVE_INTEGER)
        expect_argument(self, "groups", POSITIVE_INTEGER)
        if self.samples < 3:
            raise ValueError(f"OperatorNorm expects samples to be above 2; got {self.samples}")

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        size = raw.detach().abs().amax()
        scaled = raw / torch.where(size > 0, size, 1)  # no square overflows or vanishes
        responses = self._responses(scaled)
        spectra = cast("Tensor", linalg.svdvals(responses.detach()))
        top = spectra[..., 0].argmax()
        sigma = top_singular_value(responses.index_select(0, top.reshape(1)).squeeze(0))
        return scaled / torch.where(sigma > 0, sigma, 1)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value, {}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.forward(raw, state), state

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """|largest singular value of the convolution - 1|."""
        spectra = cast("Tensor", linalg.svdvals(self._responses(value)))
        return (spectra.amax() - 1).abs()

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the scale of raw is lost, so its Jacobian"
            " is singular"
        )

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        if value.ndim < 3 or value.numel() == 0:
            raise ValueError(
                f"{self!r} expects a kernel (out, in / groups, *taps) with entries;"
                f" got shape {tuple(value.shape)}"
            )
        expect_groups(self, value, self.groups)

    def _responses(self, kernel: Tensor) -> Tensor:
        """A matrix for each group and frequency, of which half are conjugates of the others."""
        taps: Sequence[int] = kernel.shape[2:]
        parts = grouped(kernel, self.groups)
        sides = [self.samples * size if size > 1 else 1 for size in taps]
        found: Tensor = fft.rfftn(parts, sides, tuple(range(3, parts.ndim)))
        return found.movedim((1, 2), (-2, -1)).flatten(0, -3)
