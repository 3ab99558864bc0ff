from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# softplus returns its argument above this, which has to be exact in float64 too
_LINEAR_ABOVE = 50.0

# the next term of the series is exp(2 x) / 4
_SMALL_BELOW = -20.0


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)). Its derivative is sigmoid(x)."""
    return functional.softplus(x, threshold=_LINEAR_ABOVE)


def inverse_softplus(y: Tensor) -> Tensor:
    """Compute log(exp(y) - 1) of positive y without overflow or cancellation."""
    return y + torch.log(-torch.expm1(-y))


def log_softplus(x: Tensor) -> Tensor:
    """Compute log(log(1 + exp(x))), which is x - exp(x) / 2 to rounding where exp(x) is small."""
    small = x < _SMALL_BELOW
    log = softplus(torch.where(small, 0, x)).log()
    return torch.where(small, x - x.clamp_max(_SMALL_BELOW).exp() / 2, log)
