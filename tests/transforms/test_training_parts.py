"""Training reaches the optimum of problems for sums, products, adapters, balls and grids.

The optimum comes from a formula, or from numpy and scipy.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

import funcparam as fp
from funcparam.transforms import (
    BOFT,
    HRA,
    LSQ,
    Affine,
    Ball,
    BlockCirculant,
    Chain,
    DeLoRA,
    Diagonal,
    FakeQuantizeFloat,
    Frozen,
    Gain,
    Hadamard,
    Hermitian,
    Identity,
    Isospectral,
    LeftHalfPlane,
    LowRank,
    NMSparse,
    OperatorNorm,
    Orthogonal,
    Product,
    PSDLowRank,
    RandLoRA,
    RotateIn,
    RotateOut,
    SkewHermitian,
    Sparse,
    SpectralCap,
    Sum,
    TopK,
)
from tests.transforms.test_training_constraints import STEPS, close, trained
from tests.transforms.test_training_structured import distance, randn


def complex_distance(target):
    return lambda W: (W - target).abs().square().sum()


def minimised(transform, raw, state, loss):
    """Minimise a loss of the value by L-BFGS, from this very raw; the value."""
    raw = {key: tensor.detach().clone().requires_grad_() for key, tensor in raw.items()}
    optimizer = torch.optim.LBFGS(
        raw.values(), max_iter=STEPS, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        out = loss(transform.forward(raw, state))
        out.backward()
        return out

    optimizer.step(closure)
    return transform.forward(raw, state).detach()


@pytest.mark.parametrize(("transform", "sign"), [(Hermitian(), 1), (SkewHermitian(), -1)])
def test_nearest_hermitian_matrix(transform, sign):
    M = torch.complex(randn(4, 4), randn(4, 4))
    W = trained(transform, torch.zeros_like(M), complex_distance(M))
    close(W, (M + sign * M.mH) / 2, 1e-7)


def test_poles_of_a_damped_oscillation():
    """Continuous-time poles from samples of what they do."""
    poles = torch.tensor([-0.3 + 2.0j, -1.0 - 1.0j], dtype=torch.complex128)
    times = torch.linspace(0, 3, 60, dtype=torch.float64)
    signal = (poles[:, None] * times).exp()
    start = torch.tensor([-0.5 + 1.5j, -0.5 - 0.5j], dtype=torch.complex128)
    W = trained(
        LeftHalfPlane(),
        start,
        lambda poles: ((poles[:, None] * times).exp() - signal).abs().square().sum(),
    )
    close(W, poles, 1e-6)


def test_block_circulant_approximation():
    """The nearest one has the means of the diagonals of each block."""
    M = randn(4, 6)
    W = trained(BlockCirculant(2), torch.zeros(4, 6), distance(M))
    blocks = M.reshape(2, 2, 3, 2).transpose(1, 2).numpy()
    means = [(b[0, 0] + b[1, 1], b[1, 0] + b[0, 1]) for b in blocks.reshape(6, 2, 2)]
    best = np.array([scipy.linalg.circulant([a / 2, c / 2]) for a, c in means])
    best = best.reshape(2, 3, 2, 2).transpose(0, 2, 1, 3).reshape(4, 6)
    close(W, best, 1e-8)


@pytest.mark.parametrize("p", [2, math.inf])
def test_nearest_point_of_a_ball(p):
    """From inside; a target outside is met at the boundary."""
    M = torch.tensor([3.0, -0.2, 1.0], dtype=torch.float64)
    W = trained(Ball(p, radius=1.0), M / 10, distance(M))
    close(W, M / M.norm() if p == 2 else M.clamp(-1, 1), 1e-4)


def test_singular_values_are_capped():
    """The nearest matrix with singular values up to 1 cuts the larger ones (von Neumann)."""
    M = randn(5, 3)
    U, s, Vh = scipy.linalg.svd(M.numpy(), full_matrices=False)
    p = fp.parametrize({"w": M}, {"w": SpectralCap(1.0)})
    X = (M / 10).requires_grad_()
    optimizer = torch.optim.SGD([X], lr=0.05)  # beyond the bound there is nothing to search
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = p({"w": X}, {"w": {"cap": torch.ones((), dtype=torch.float64)}})["w"]
        distance(M)(value).backward()
        optimizer.step()
    close(value.detach(), (U * s.clip(max=1)) @ Vh, 1e-4)


def test_singular_vectors_of_a_given_spectrum():
    """The largest inner product is that of the sorted singular values (von Neumann)."""
    start, M = randn(5, 4), randn(5, 4)
    W = trained(Isospectral(), start, lambda W: -(W * M).sum())
    best = scipy.linalg.svdvals(start.numpy()) @ scipy.linalg.svdvals(M.numpy())
    close((W * M).sum(), best, 1e-6)


def test_a_kernel_of_norm_one_is_met():
    """Its norm is that of the dense circulant matrix of one channel."""
    target = randn(1, 1, 3)
    operator = scipy.linalg.circulant([*target.flatten().tolist(), *[0.0] * 9])
    target = target / scipy.linalg.svdvals(operator)[0]
    W = trained(OperatorNorm(), randn(1, 1, 3), distance(target))
    close(W, target, 1e-5)


def test_sparse_least_squares():
    """On the entries that are kept, what least squares says."""
    A, b = randn(20, 6), randn(20)
    start = torch.tensor([0.0, 2.0, 0.0, -1.0, 3.0, 0.0])
    W = trained(Sparse(3), start, lambda w: (A @ w - b).square().sum())
    kept = [1, 3, 4]
    close(W[kept], scipy.linalg.lstsq(A[:, kept].numpy(), b.numpy())[0], 1e-7)
    assert W.count_nonzero() == 3


@pytest.mark.parametrize("transform", [TopK(0.5), NMSparse(2, 4)], ids=str)
def test_straight_through_training_finds_the_pattern(transform):
    """A target of the pattern is met, from raw of another one."""
    target = randn(4, 8)
    groups = target.abs().reshape(4, 2, 4)
    kept = (groups >= groups.topk(2).values[..., -1:]).reshape(4, 8)
    target = torch.where(kept, target + 0.5 * target.sign(), 0)  # well apart from what is 0
    p = fp.parametrize({"w": target}, {"w": transform})
    raw, state = p.init({"w": 0.1 * randn(4, 8)})
    X = raw["w"].requires_grad_()
    optimizer = torch.optim.SGD([X], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        distance(target)(p({"w": X}, state)["w"]).backward()
        optimizer.step()
    close(p({"w": X}, state)["w"].detach(), target, 1e-6)


def test_straight_through_training_finds_numbers_of_a_format():
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    target = numbers[torch.randint(8, (6, 5))] * torch.where(torch.rand(6, 5) < 0.5, -1.0, 1.0)
    target[0, 0] = 6.0
    transform = FakeQuantizeFloat("float4_e2m1fn")
    p = fp.parametrize({"w": target}, {"w": transform})
    _, state = p.init({"w": target})
    X = randn(6, 5).clamp(-5, 5).requires_grad_()
    optimizer = torch.optim.SGD([X], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        distance(target)(p({"w": X}, state)["w"]).backward()
        optimizer.step()
    close(p({"w": X}, state)["w"].detach(), target, 1e-9)


def test_the_step_of_a_grid_is_learnt():
    """The scale finds the step of a target that is on a grid of another one."""
    target = 0.4 * torch.randint(-3, 4, (8, 8)).double()
    transform = LSQ(bits=3)
    raw, state = transform.right_inverse(target * 1.2)
    raw = {"weight": target.clone(), "scale": raw["scale"]}
    parts = [tensor.requires_grad_() for tensor in raw.values()]
    optimizer = torch.optim.SGD(parts, lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        distance(target)(transform.forward(raw, state)).backward()
        optimizer.step()
    close(transform.forward(raw, state).detach(), target, 1e-3)


def test_low_rank_update_of_a_frozen_weight():
    """Eckart and Young for what is missing."""
    base, M = randn(6, 5), randn(6, 5)
    W = trained(Sum(Frozen(), LowRank(2)), base, distance(M))
    missing = scipy.linalg.svdvals((M - base).numpy())
    close((W - M).square().sum(), (missing[2:] ** 2).sum(), 1e-6)


def test_factor_analysis():
    """A covariance of one factor and a diagonal is met exactly."""
    loadings, noise = randn(5, 1), torch.rand(5, dtype=torch.float64) + 0.5
    C = loadings @ loadings.mT + torch.diag(noise)
    W = trained(Sum(PSDLowRank(1), Diagonal()), torch.eye(5), distance(C))
    close(W, C, 1e-5)


def test_a_factor_beside_a_frozen_one():
    """Least squares with the frozen weight as its matrix."""
    base, M = randn(6, 4), randn(6, 4)
    W = trained(Product(Frozen(), Identity(), inner="in"), base, distance(M))
    close(W, base.numpy() @ scipy.linalg.lstsq(base.numpy(), M.numpy())[0], 1e-6)


def test_entries_of_a_frozen_weight_scaled_by_low_rank():
    base, u, v = randn(5, 4), randn(5, 1), randn(1, 4)
    M = base * (1 + u @ v)
    W = trained(Hadamard(Frozen(), Chain(LowRank(1), Affine(shift=1.0))), base, distance(M))
    close(W, M, 1e-4)


def test_scaled_procrustes():
    """Of g Q, the nearest to M is the polar factor times the mean of its singular values."""
    M = randn(4, 4)
    U, s, Vh = scipy.linalg.svd(M.numpy())
    skew = randn(4, 4)
    start = torch.from_numpy(U @ Vh) @ torch.matrix_exp(0.2 * (skew - skew.mT))
    W = trained(Gain(Orthogonal()), start, distance(M))
    close(W, s.mean() * (U @ Vh), 1e-5)


def turned(base, *planes):
    """The weight with its inputs turned in some planes."""
    R = np.eye(base.shape[1])
    for i, j, angle in planes:
        own = np.eye(base.shape[1])
        own[[i, i, j, j], [i, j, i, j]] = [
            math.cos(angle),
            -math.sin(angle),
            math.sin(angle),
            math.cos(angle),
        ]
        R = own @ R
    return base @ torch.from_numpy(R)


@pytest.mark.parametrize("transform", [HRA(2), BOFT(2, 1)], ids=str)
def test_a_turn_of_the_inputs_is_found(transform):
    base = randn(5, 4)
    M = turned(base, (0, 1, 0.7))
    W = trained(transform, base, distance(M))
    close(W, M, 1e-5)


def test_bounded_low_rank_adapters_meet_what_they_express():
    base = randn(5, 4)
    transform = DeLoRA(2)
    raw, state = transform.right_inverse(base)
    other = {key: torch.randn_like(tensor) for key, tensor in raw.items()}
    target = transform.forward({**other, "lambda": torch.tensor(2.0).double()}, state)
    near = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in other.items()}
    near["lambda"] = torch.tensor(1.5).double()
    close(minimised(transform, near, state, distance(target)), target, 1e-4)


def test_scales_of_random_bases_meet_what_they_express():
    base = randn(5, 4)
    transform = RandLoRA(2)
    raw, state = transform.right_inverse(base)
    moved = {key: tensor + 0.3 * torch.randn_like(tensor) for key, tensor in raw.items()}
    target = transform.forward(moved, state)
    near = {key: tensor + 0.05 * torch.randn_like(tensor) for key, tensor in moved.items()}
    close(minimised(transform, near, state, distance(target)), target, 1e-4)


def test_one_rotation_for_two_weights():
    """Procrustes: the rotation of what is between two weights that brings one of them to a target.

    The other is turned back, so that the product of the two stays.
    """
    weights = {"R": torch.eye(4).double(), "up": randn(4, 6), "down": randn(5, 4)}
    target = turned(weights["down"], (0, 1, 0.4), (2, 3, -0.3))
    p = fp.parametrize(weights, {"R": Orthogonal(), "up": RotateOut("R"), "down": RotateIn("R")})
    raw, state = p.init(weights)
    X = raw["R"].requires_grad_()
    optimizer = torch.optim.LBFGS([X], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = distance(target)(p(raw, state)["down"])
        loss.backward()
        return loss

    optimizer.step(closure)
    values = p(raw, state)
    R, _ = scipy.linalg.orthogonal_procrustes(weights["down"].numpy(), target.numpy())
    close(values["down"].detach(), weights["down"].numpy() @ R, 1e-4)
    close((values["down"] @ values["up"]).detach(), weights["down"] @ weights["up"], 1e-9)
