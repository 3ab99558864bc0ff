from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import INTEGER, POSITIVE_NUMBER, expect_argument
from funcparam.transforms.contract.base import State, Transform, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.norms import norms
from funcparam.transforms.numerics.slices import expect_slices, other_dims


@final
@dataclass(frozen=True)
class WeightStandardization(Transform[Tensor]):
    r"""Weights of mean 0 and variance 1 for each output.

    $$W = \frac{X - \mu}{\max(\sigma, \epsilon)}, \qquad \mu = \operatorname{mean} X, \qquad
    \sigma = \sqrt{\operatorname{mean} (X - \mu)^2}$$

    The means run over all dimensions but `dim`. Raw has the shape of the value. Real dtypes. A
    value of mean 0 and variance 1 is kept; any other is standardized, the nearest such value in
    direction and scale. What does not vary becomes 0.

    `eps` bounds the deviation from below instead of being added to it, so that a standardized
    weight stays as it is. Elsewhere the two differ by the order of `eps`.

    Args:
        dim: the dimension of outputs: 0 for Linear and Conv, 1 for ConvTranspose.
        eps: lower bound of the deviation.

    Raises:
        ValueError: `eps` is not positive; at `fp.parametrize`, if the value is not real or has
            no dimension `dim` with more than one entry at each index.

    Example:
        >>> import torch
        >>> from funcparam.transforms import WeightStandardization
        >>> WeightStandardization().forward(torch.tensor([[1.0, 3.0], [5.0, 4.0]]), {})
        tensor([[-1.,  1.],
                [ 1., -1.]])

    Source: Qiao et al., Micro-batch training with batch-channel normalization and weight
    standardization, arXiv 1903.10520, equations 8 and 9.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "direction"}

    dim: int = 0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        expect_argument(self, "dim", INTEGER)
        expect_argument(self, "eps", POSITIVE_NUMBER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        centred = raw - self._mean(raw)
        # what a large mean left behind by rounding, which has no derivative
        centred = centred - self._mean(centred.detach())
        # the derivative of a division passes over raw more often
        return centred * self._deviation(centred).clamp_min(self.eps).reciprocal()

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value, {}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        varies = self._deviation(raw - self._mean(raw)) >= self.eps
        return torch.where(varies, self.forward(raw, state), raw), state

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """The largest |mean| or |deviation - 1|."""
        mean = self._mean(value)
        deviation = self._deviation(value - mean)
        return torch.maximum(largest(mean), largest(deviation - 1))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the mean and scale of raw are lost, so its"
            " Jacobian is singular"
        )

    def check(self, value: Tensor) -> None:
        expect_slices(self, value, self.dim)

    def _mean(self, tensor: Tensor) -> Tensor:
        return tensor.mean(other_dims(tensor, self.dim), keepdim=True)

    def _deviation(self, centred: Tensor) -> Tensor:
        norm = norms(centred, other_dims(centred, self.dim))
        return norm / sqrt(max(centred.numel() // max(norm.numel(), 1), 1))
