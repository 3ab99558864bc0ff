"""Training reaches the optimum of problems on manifolds of matrices.

At most 300 steps each; the optimum comes from a formula, or from scipy.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from funcparam.transforms import (
    AlmostOrthogonal,
    FixedRank,
    Grassmann,
    Invertible,
    SpecialLinear,
    Stiefel,
    Unitary,
)
from tests.transforms.test_training_constraints import close, second_moment, trained


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def distance(target):
    return lambda W: (W - target).abs().square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(20, 3), (3, 8)], ids=str)
def test_orthogonal_procrustes(shape, dtype):
    """The nearest matrix with orthonormal columns or rows is the polar factor."""
    M = randn(*shape, dtype=dtype)
    W = trained(Stiefel(), randn(*shape, dtype=dtype), distance(M))
    U, _, Vh = scipy.linalg.svd(M.numpy(), full_matrices=False)
    close(W, U @ Vh, 1e-6)


def test_unbalanced_procrustes_is_a_frame_of_eigenvectors():
    """Brockett: with distinct weights the frame itself is determined, each column to a sign."""
    C, weights = second_moment(7), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    W = trained(Stiefel(), randn(7, 3), lambda W: -((W.mT @ C @ W).diagonal() * weights).sum())
    top = torch.from_numpy(scipy.linalg.eigh(C.numpy())[1]).flip(-1)[:, :3]
    close(abs(W.mT @ top), torch.eye(3, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("map", ["matrix_exp", "cayley"])
def test_unitary_procrustes(map):
    M = randn(5, 5, dtype=torch.complex128)
    W = trained(Unitary(map), randn(5, 5, dtype=torch.complex128), distance(M))
    close(W, scipy.linalg.polar(M.numpy())[0], 1e-6)


@pytest.mark.parametrize("shape", [(8, 2), (2, 8)], ids=str)
def test_principal_subspace(shape):
    C = second_moment(8)

    def frame(W):
        return W if shape[0] > shape[1] else W.mT

    W = trained(Grassmann(), randn(*shape), lambda W: -(frame(W).mT @ C @ frame(W)).trace())
    top = scipy.linalg.eigh(C.numpy(), subset_by_index=(6, 7))[1]
    close(frame(W) @ frame(W).mT, top @ top.T, 1e-6)


def test_fixed_rank_approximation():
    M = randn(12, 8)
    W = trained(FixedRank(3), randn(12, 8), distance(M))
    U, S, Vh = scipy.linalg.svd(M.numpy(), full_matrices=False)
    close(W, (U[:, :3] * S[:3]) @ Vh[:3], 1e-5)


def test_fixed_rank_completion():
    M = randn(12, 2) @ randn(2, 10)
    seen = torch.rand(12, 10) < 0.7
    W = trained(FixedRank(2), torch.where(seen, M, 0), lambda W: (W - M)[seen].square().sum())
    close(W, M, 1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
def test_nearest_almost_orthogonal_matrix(shape):
    """Its singular values are clipped: here on both bounds and between them."""
    U, _, Vh = scipy.linalg.svd(randn(*shape).numpy(), full_matrices=False)
    spectrum = np.array([2.0, 1.2, 0.9, 0.1])
    start = randn(*shape)
    W = trained(AlmostOrthogonal(0.4), start, distance(torch.from_numpy((U * spectrum) @ Vh)))
    close(W, (U * spectrum.clip(0.6, 1.4)) @ Vh, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_whitening(dtype):
    """The likelihood of a linear unmixing; at its optimum the outputs are white."""
    x = randn(5, 300, dtype=dtype)
    C = randn(5, 5, dtype=dtype) @ x @ x.mH / 300
    C = C @ C.mH

    def loss(W):
        return (W @ C @ W.mH).diagonal().real.sum() / 2 - torch.linalg.slogdet(W).logabsdet

    W = trained(Invertible(), randn(5, 5, dtype=dtype), loss)
    close(W @ C @ W.mH, torch.eye(5, dtype=dtype), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_least_power_at_unit_volume(dtype):
    """Arithmetic and geometric means: the least trace of W C W^H is n det(C)^(1/n)."""
    A = randn(4, 12, dtype=dtype)
    C = A @ A.mH / 12
    W = trained(
        SpecialLinear(), randn(4, 4, dtype=dtype), lambda W: (W @ C @ W.mH).diagonal().real.sum()
    )
    best = math.exp(np.linalg.slogdet(C.numpy())[1] / 4)
    close(W @ C @ W.mH, best * torch.eye(4, dtype=dtype), 1e-5)
