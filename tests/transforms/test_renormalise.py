"""rebase of maps that do not depend on the length of raw, as nGPT, EDM2 and Hyperball need it."""

import pytest
import torch
from torch import Tensor
from torch.func import grad

from funcparam.transforms import (
    AOL,
    Gain,
    SpectralNorm,
    UnitNorm,
    WeightNorm,
    WeightStandardization,
)

close = torch.testing.assert_close


def grown(raw, factor):
    """Raw after steps that made its direction longer and nothing else."""
    if isinstance(raw, Tensor):
        return factor * raw
    kept = ("magnitude", "gain")
    return {key: t if key in kept else factor * t for key, t in raw.items()}


@pytest.mark.parametrize(
    "transform",
    [
        UnitNorm(),
        UnitNorm(dim=(1, 2, 3)),
        UnitNorm(dim=None, radius=None),
        SpectralNorm(),
        SpectralNorm(n_power_iterations=None),
        WeightNorm(),
        WeightNorm(dim=None),
        WeightStandardization(),
        AOL(),
        Gain(UnitNorm()),
    ],
    ids=str,
)
@pytest.mark.parametrize("factor", [3.0, 1e-3])
def test_length_is_undone_and_the_value_stays(transform, factor):
    raw, state = transform.right_inverse(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    value = transform.forward(raw, state)
    moved, base = transform.rebase(grown(raw, factor), state)
    expected, _ = transform.rebase(raw, state)
    close(moved, expected)
    close(transform.forward(moved, base), value)
    close(transform.rebase(moved, base), (moved, base))  # once is enough


def test_magnitudes_and_their_signs_stay():
    raw = {"magnitude": torch.tensor([[-2.0], [0.0]]), "direction": torch.ones(2, 4)}
    moved, _ = WeightNorm().rebase(raw, {})
    close(moved["magnitude"], raw["magnitude"])
    close(moved["direction"].norm(dim=1), torch.tensor([2.0, 1.0]))


def test_a_row_without_variance_stays():
    raw = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    moved, _ = WeightStandardization().rebase(raw, {})
    close(moved[0], raw[0])


def loss(value):
    return (value - torch.arange(12.0, dtype=torch.float64).reshape(3, 4).sin()).square().sum()


def gradient(transform, raw, state):
    return grad(lambda X: loss(transform.forward(X, state)))(raw)


def test_hyperball():
    """W <- R N(W - lr R N(u)) with R = |W_0|, as in the paper's algorithm."""
    W = torch.randn(3, 4, dtype=torch.float64)
    transform = UnitNorm(dim=None, radius=None)
    raw, state = transform.right_inverse(W)
    R = W.norm()
    for _ in range(5):
        u = gradient(transform, raw, state)
        raw = raw - 0.1 * R * u / u.norm()
        raw, state = transform.rebase(raw, state)

        G = grad(loss)(W)
        G = G - W * (G * W).sum() / R**2  # of the value, which does not see the length
        W = W - 0.1 * R * G / G.norm()
        W = R * W / W.norm()
        close(transform.forward(raw, state), W)
        close(raw, W)


def test_ngpt():
    """Each row is normalised after the step; the step is along the sphere."""
    W = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=-1)
    transform = UnitNorm()
    raw, state = transform.right_inverse(W)
    for _ in range(5):
        raw = raw - 0.1 * gradient(transform, raw, state)
        raw, state = transform.rebase(raw, state)
        G = grad(loss)(W)
        W = W - 0.1 * (G - W * (G * W).sum(-1, keepdim=True))
        W = torch.nn.functional.normalize(W, dim=-1)
        close(transform.forward(raw, state), W)


def test_edm2():
    """W = gain * X / |X| for each filter; in training X <- X / |X| (Karras et al., B.4)."""
    X = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    raw, state = Gain(UnitNorm(dim=(1, 2, 3))).right_inverse(X)
    unit = X / torch.linalg.vector_norm(X, dim=(1, 2, 3), keepdim=True)
    close(raw["gain"], (unit * X).sum() / 4)
    raw["gain"] = torch.full((), 0.7, dtype=torch.float64)
    value = Gain(UnitNorm(dim=(1, 2, 3))).forward(raw, state)
    close(value, 0.7 * unit)
    moved, _ = Gain(UnitNorm(dim=(1, 2, 3))).rebase(raw, state)
    close(moved["0"], unit)
