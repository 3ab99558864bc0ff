from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# softplus returns its argument above this, which has to be exact in float64 too
_LINEAR_ABOVE = 50.0


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)). Its derivative is sigmoid(x)."""
    return functional.softplus(x, threshold=_LINEAR_ABOVE)


def inverse_softplus(y: Tensor) -> Tensor:
    """Compute log(exp(y) - 1) of positive y without overflow or cancellation."""
    return y + torch.log(-torch.expm1(-y))
