"""Karcher means, against scipy and the definition."""

import math

import pytest
import scipy.linalg
import torch

from funcparam.transforms import Orthogonal, SpecialOrthogonal, Stiefel, Unitary

D, C = torch.float64, torch.complex128
close = torch.testing.assert_close


def skew(n, size, dtype=D):
    X = torch.randn(n, n, dtype=dtype)
    X = X - X.mH
    return size * X / torch.linalg.matrix_norm(X, 2)


def uniform(count):
    return torch.full((count,), 1 / count, dtype=D)


def exp(X):
    return torch.from_numpy(scipy.linalg.expm(X.numpy()))


@pytest.mark.parametrize(
    ("transform", "dtype"),
    [(Orthogonal(), D), (SpecialOrthogonal(), D), (Unitary(), C), (Stiefel(), D), (Stiefel(), C)],
    ids=str,
)
def test_logarithms_from_the_mean_sum_to_zero(transform, dtype):
    """By scipy's logarithm; and moving every point moves the mean."""
    base = torch.linalg.qr(torch.randn(5, 5, dtype=dtype)).Q
    points = torch.stack([base @ exp(skew(5, 0.9, dtype)) for _ in range(4)])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=D)
    mean = transform.karcher_mean(points, weights)
    logs = [torch.from_numpy(scipy.linalg.logm((mean.mH @ P).numpy())) for P in points]
    total = sum(w * log for w, log in zip(weights, logs, strict=True))
    assert total.abs().max() < 1e-12
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=dtype)).Q
    close(transform.karcher_mean(turn @ points, weights), turn @ mean)


def test_of_rotations_of_the_plane_it_is_the_mean_angle():
    angles = torch.tensor([-1.1, 0.2, 1.3], dtype=D)
    points = torch.stack([exp(torch.tensor([[0, -a], [a, 0]], dtype=D)) for a in angles])
    mean = SpecialOrthogonal().karcher_mean(points, uniform(3))
    close(torch.atan2(mean[1, 0], mean[0, 0]), angles.mean())


@pytest.mark.parametrize("shape", [(6, 2), (7, 6), (3, 5), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [D, C], ids=str)
def test_the_middle_of_a_geodesic_of_the_stiefel_manifold(shape, dtype):
    """In its canonical metric: `[M, M'] exp([[A, -B^H], [B, 0]])`, Edelman et al., eq. 2.42."""
    n, k = max(shape[-2:]), min(shape[-2:])
    frame = torch.linalg.qr(torch.randn(*shape[:-2], n, n, dtype=dtype)).Q
    X = torch.stack([skew(n, 0.8, dtype) for _ in range(math.prod(shape[:-2]))])
    X[:, k:, k:] = 0
    X = X.reshape(frame.shape)
    ends = [(frame @ torch.matrix_exp(sign * X))[..., :k] for sign in (-1, 1)]
    points, middle = torch.stack(ends), frame[..., :k]
    if shape[-2] < shape[-1]:
        points, middle = points.mT, middle.mT
    close(Stiefel().karcher_mean(points, uniform(2)), middle)
    one_third = (frame @ torch.matrix_exp(-X / 3))[..., :k]
    one_third = one_third.mT if shape[-2] < shape[-1] else one_third
    found = Stiefel().karcher_mean(points, torch.tensor([2 / 3, 1 / 3], dtype=D))
    close(found, one_third)


def test_single_precision():
    base = torch.linalg.qr(torch.randn(64, 16)).Q
    points = torch.stack([torch.matrix_exp(skew(64, 0.5, torch.float32)) @ base for _ in range(3)])
    mean = Stiefel().karcher_mean(points, uniform(3).float())
    assert Stiefel().violation(mean, {}) < 1e-5
    close(mean.double(), Stiefel().karcher_mean(points.double(), uniform(3)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "points",
    [
        [torch.eye(3), -torch.eye(3)],
        [torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1.0]))],
        [torch.eye(4, 2), -torch.eye(4, 2)],
        [exp(angle * torch.tensor([[0.0, -1.0], [1.0, 0.0]])) for angle in (0, 2.1, 4.2)],
    ],
    ids=["opposite", "other determinant", "opposite frames", "around the circle"],
)
def test_of_points_too_far_apart_there_is_none(points):
    with pytest.raises(ValueError, match="less than a quarter turn from their mean"):
        Stiefel().karcher_mean(torch.stack(points).double(), uniform(len(points)))
