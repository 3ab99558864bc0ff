"""Parametrizations for the tests, and the two implementations side by side."""

import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_functions
from torch.nn.utils import parametrize as torch_api

from funcparam.compat import parametrizations as functions
from funcparam.compat import parametrize as api

BOTH = {"torch": (torch_api, torch_functions), "compat": (api, functions)}

__all__ = [
    "BOTH",
    "Centred",
    "Double",
    "Factors",
    "Scaled",
    "Sum",
    "Symmetric",
    "api",
    "functions",
    "torch_api",
]


class Double(nn.Module):
    def forward(self, X):
        return 2 * X

    def right_inverse(self, value):
        return value / 2


class Symmetric(nn.Module):
    """No right inverse: the tensor itself is raw."""

    def forward(self, X):
        return X.triu() + X.triu(1).mT


class Sum(nn.Module):
    """Two raw tensors of the shape of the value; the first is the value itself."""

    def forward(self, X, Y):
        return X + Y

    def right_inverse(self, value):
        return value, torch.zeros_like(value)


class Factors(nn.Module):
    """Two raw tensors of other shapes."""

    def forward(self, x, y):
        return x.unsqueeze(-1) @ y.unsqueeze(-2)

    def right_inverse(self, value):
        U, S, Vh = torch.linalg.svd(value, full_matrices=False)
        root = S[0].sqrt().unsqueeze(-1)
        return U[..., :, 0] * root, Vh[..., 0, :] * root


class Scaled(nn.Module):
    """Has a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.double))
        self.register_buffer("shift", torch.tensor(0.25, dtype=torch.double))

    def forward(self, X):
        return X * self.scale + self.shift

    def right_inverse(self, value):
        return (value - self.shift) / self.scale


class Centred(nn.Module):
    """Depends on the training mode."""

    def forward(self, X):
        return X - 0.5 if self.training else X

    def right_inverse(self, value):
        return value
