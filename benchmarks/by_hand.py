"""The same maps as one would write them by hand for equal leaves: the bound on what `p` can reach.

Raw and state are lists; each function stacks them, computes bare mathematics once, and takes the
result apart. Nothing is checked, no dtype is promoted, no order of derivatives beyond the first is
asked for.
"""

import torch
from torch import nn

from funcparam.transforms.numerics.skew_exp import _nearest_orthogonal, _taylor


def _skew(raw):
    lower = torch.stack(raw).tril()
    return lower - lower.mT


def _based(frame, state):
    return (torch.stack([own["base"] for own in state]) @ frame).unbind()


def matrix_exp(raw, state):
    """The polynomial and as many squarings as the largest norm asks for."""
    A = _skew(raw)
    norm = torch.linalg.vector_norm(A.detach(), dim=(-2, -1)).amax().item()
    doublings = 0
    while norm > 0.82 * 2**doublings:
        doublings += 1
    power = _taylor(A, A @ A, 2.0**-doublings)
    for _ in range(doublings):
        power = power @ power
    return _based(_nearest_orthogonal(power) if doublings else power, state)


def cayley(raw, state):
    """One inverse."""
    A = _skew(raw)
    identity = torch.eye(A.shape[-1])
    return _based(2 * torch.linalg.inv(identity - A / 2) - identity, state)


def householder(raw, state):
    """One product and one triangular solve."""
    X = torch.stack(raw)
    identity = torch.eye(X.shape[-1])
    V = X.tril(-1) + identity
    gram = V.mT @ V
    S = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    solved = torch.linalg.solve_triangular(S, V.mT, upper=True)
    return _based(V @ solved - identity, state)


def spectral_norm(raw, state):
    """One step of power iteration and a division, as a training step has them."""
    X = torch.stack(raw)
    with torch.no_grad():
        v = torch.stack([own["v"] for own in state]).unsqueeze(-1)
        u = nn.functional.normalize(X @ v, dim=-2)
        v = nn.functional.normalize(X.mT @ u, dim=-2)
        for own, x, y in zip(state, u.squeeze(-1).unbind(), v.squeeze(-1).unbind(), strict=True):
            own["u"], own["v"] = x, y
    return (X / (u.mT @ X @ v)).unbind()


def spectral_division(raw, state):
    """The same without a step."""
    X = torch.stack(raw)
    u, v = (torch.stack([own[name] for own in state]).unsqueeze(-1) for name in ("u", "v"))
    return (X / (u.mT @ X @ v)).unbind()


def weight_norm(raw, state):
    """PyTorch's kernel over the rows of all leaves."""
    g = torch.cat([own["magnitude"] for own in raw])
    V = torch.cat([own["direction"] for own in raw])
    return torch._weight_norm(V, g, 0).split(len(raw[0]["direction"]))


MAPS = {
    "matrix_exp": matrix_exp,
    "cayley": cayley,
    "householder": householder,
    "spectral_norm": spectral_norm,
    "weight_norm": weight_norm,
}
