"""A network with each of torch's parametrizations, for packages that take any."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm


def network():
    """Linear layers with orthogonal, weight_norm and spectral_norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        orthogonal(nn.Linear(4, 4)),
        nn.Tanh(),
        weight_norm(nn.Linear(4, 6)),
        nn.Tanh(),
        spectral_norm(nn.Linear(6, 3)),
    )


def data():
    """Inputs and labels."""
    torch.manual_seed(1)
    return torch.randn(12, 4), torch.arange(12) % 3
