"""Training reaches the optimum of problems whose solution has the structure.

At most 300 steps each; the optimum comes from a formula, or from numpy and scipy.
"""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch

import funcparam as fp
from funcparam.transforms import (
    AOL,
    IA3,
    OFT,
    Affine,
    BlockDiagonal,
    Chain,
    Circulant,
    DoRA,
    DoublyStochastic,
    FakeQuantize,
    Kronecker,
    LInfLipschitz,
    LoHa,
    LowRank,
    Monarch,
    Orthogonal,
    Permute,
    Reshape,
    Ternary,
    Toeplitz,
    Transpose,
    VeRA,
    WeightStandardization,
)
from tests.test_training_constraints import STEPS, close, trained


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def distance(target):
    return lambda W: (W - target).square().sum()


def test_low_rank_approximation():
    """Eckart and Young: the least distance is that of the singular values beyond the rank."""
    M = randn(12, 8)
    W = trained(LowRank(3), randn(12, 8), distance(M))
    close((W - M).square().sum(), (scipy.linalg.svdvals(M.numpy())[3:] ** 2).sum(), 1e-8)


def test_matrix_completion():
    M = randn(12, 2) @ randn(2, 10)
    seen = torch.rand(12, 10) < 0.7
    W = trained(LowRank(2), torch.where(seen, M, 0), lambda W: (W - M)[seen].square().sum())
    close(W, M, 1e-5)


def test_kronecker_approximation():
    M = randn(6, 8)
    blocks = M.reshape(2, 3, 4, 2).transpose(1, 2).reshape(8, 6).numpy()
    best = (scipy.linalg.svdvals(blocks)[1:] ** 2).sum()
    W = trained(Kronecker((2, 4)), randn(6, 8), distance(M))
    close((W - M).square().sum(), best, 1e-8)


def test_monarch_approximation():
    """The least distance is that of the second and later singular values of each slice."""
    M = randn(6, 8)
    W = trained(Monarch(2), randn(6, 8), distance(M))
    slices = M.reshape(3, 2, 2, 4).permute(1, 2, 0, 3).numpy()
    best = (np.linalg.svd(slices, compute_uv=False)[..., 1:] ** 2).sum()
    close((W - M).square().sum(), best, 1e-8)


def test_scales_of_random_factors_fit_what_they_can_express():
    base = randn(5, 4)
    _, state = VeRA(3).right_inverse(base)
    target = VeRA(3).forward({"b": randn(5), "d": randn(3)}, state)
    raw = {"b": torch.ones_like(base[:, 0]), "d": torch.ones_like(base[:3, 0])}
    for part in raw.values():
        part.requires_grad_()
    optimizer = torch.optim.LBFGS(
        raw.values(), max_iter=STEPS, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = (VeRA(3).forward(raw, state) - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    close(VeRA(3).forward(raw, state).detach(), target, 1e-3)


def test_circulant_system_identification():
    """The filter of a circular convolution, from its inputs and outputs."""
    c, x = randn(8), randn(8, 40)
    y = torch.fft.ifft(torch.fft.fft(c).unsqueeze(1) * torch.fft.fft(x, dim=0), dim=0).real
    W = trained(Circulant(), torch.zeros(8, 8), lambda W: (W @ x - y).square().mean())
    close(W, scipy.linalg.circulant(c.numpy()), 1e-6)


def test_toeplitz_system_identification():
    """A causal filter of finite response, from long windows of a signal to what it gave."""
    h, signal = randn(4), randn(60)
    y = torch.from_numpy(np.convolve(signal.numpy(), h.numpy(), mode="valid"))
    x = signal.unfold(0, 8, 1).mT  # windows that give 5 outputs each
    y = y.unfold(0, 5, 1).mT
    W = trained(Toeplitz(), torch.zeros(5, 8), lambda W: (W @ x - y).square().mean())
    close(W, scipy.linalg.toeplitz(np.r_[h[-1], np.zeros(4)], np.r_[h.flip(0), np.zeros(4)]), 1e-5)


def test_block_diagonal_regression():
    """Each block is the least-squares solution of its own inputs."""
    x, y = randn(6, 50), randn(4, 50)
    W = trained(BlockDiagonal(2), torch.zeros(4, 6), lambda W: (W @ x - y).square().mean())
    parts = [
        scipy.linalg.lstsq(x[3 * i : 3 * i + 3].mT.numpy(), y[2 * i : 2 * i + 2].mT.numpy())[0].T
        for i in range(2)
    ]
    close(W, scipy.linalg.block_diag(*parts), 1e-6)


def test_sinkhorn_assignment():
    """Of a linear cost the optimum is a permutation: the best assignment."""
    cost = torch.rand(7, 7, dtype=torch.float64)
    W = trained(DoublyStochastic(), torch.full((7, 7), 1 / 7), lambda W: (W * cost).sum())
    rows, columns = scipy.optimize.linear_sum_assignment(cost.numpy())
    best = np.zeros((7, 7))
    best[rows, columns] = 1
    close(W, best, 1e-3)


def test_nearest_doubly_stochastic_matrix():
    """Khoury 1998: off the boundary, rows and columns are shifted to sum to 1."""
    n = 5
    M = 0.2 + 0.02 * randn(n, n)
    J = torch.full((n, n), 1 / n, dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    W = trained(DoublyStochastic(), J, distance(M))
    close(W, (eye - J) @ M @ (eye - J) + J, 1e-6)


def test_nearest_standardized_matrix():
    M = randn(4, 9)
    W = trained(WeightStandardization(), randn(4, 9), distance(M))
    close(W, scipy.stats.zscore(M.numpy(), axis=1), 1e-5)


def test_almost_orthogonal_regression():
    """A teacher of this kind is found from what it does."""
    X, x = randn(6, 4).numpy(), randn(4, 30)
    teacher = torch.from_numpy(X / np.sqrt(abs(X.T @ X).sum(1)))
    W = trained(AOL(), randn(6, 4), lambda W: (W @ x - teacher @ x).square().mean())
    close(W, teacher, 1e-5)


def test_rows_projected_on_the_ball_of_the_one_norm():
    """With a bound b the nearest row is M shrunk by t with sum(|M| - t) = b, if no sign changes."""
    M = torch.tensor([[1.0, 1.2, -0.9], [-1.1, 0.8, 1.0]], dtype=torch.float64)
    raw, state = LInfLipschitz().right_inverse(M)
    bound = torch.tensor(2.0, dtype=torch.float64).expm1().log()
    X = raw["weight"].clone().requires_grad_()
    optimizer = torch.optim.SGD([X], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        W = LInfLipschitz().forward({"weight": X, "bound": bound}, state)
        (W - M).square().sum().backward()
        optimizer.step()
    t = (M.abs().sum(1, keepdim=True) - 2) / 3
    close(W.detach(), M - t * M.sign(), 1e-6)


def test_adapters_find_what_they_can_express():
    base = randn(6, 5)
    scaled = torch.rand(6, 1, dtype=torch.float64) + 0.5
    target = scaled * (base + 0.3 * randn(6, 1) @ randn(1, 5))
    close(trained(DoRA(1), base, distance(target)), target, 1e-5)
    change = (randn(6, 1) @ randn(1, 5)) * (randn(6, 1) @ randn(1, 5))
    close(trained(LoHa(1), base, distance(base + change)), base + change, 1e-4)
    A = 0.3 * randn(5, 5)
    turned = base @ torch.linalg.matrix_exp(A - A.mT)
    close(trained(OFT(1), base, distance(turned)), turned, 1e-5)
    close(trained(IA3(), base, distance(scaled * base)), scaled * base, 1e-6)


@pytest.mark.parametrize(
    ("transform", "atol"), [(Ternary(), 1e-3), (FakeQuantize(3), 1e-9)], ids=str
)
def test_straight_through_training_finds_the_levels(transform, atol):
    """By gradient descent: to a line search the value is constant."""
    steps = 1 if isinstance(transform, Ternary) else 3
    target = torch.randint(-steps, steps + 1, (6, 5)).double() / steps
    target[0, :2] = torch.tensor([1.0, 0.0])
    p = fp.parametrize({"w": target}, {"w": transform})
    _, state = p.init({"w": target})
    X = randn(6, 5).clamp(-1, 1).requires_grad_()  # outside of the range nothing would train
    optimizer = torch.optim.SGD([X], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (p({"w": X}, state)["w"] - target).square().sum().backward()
        optimizer.step()
    value = p({"w": X}, state)["w"].detach()
    assert p.violation({"w": value}, state)["w"] < 1e-12
    close(value, target, atol)


def test_orthogonal_procrustes_through_plumbing():
    """The nearest orthogonal kernel of a convolution, trained turned, scaled and reshaped."""
    M = randn(4, 4, 3, 1)
    kernel = Reshape((12, 4), (4, 3, 1, 4)), Permute((3, 0, 1, 2))
    chain = Chain(Orthogonal(), Transpose(), *kernel, Affine(2.0))
    W = trained(chain, M, distance(2 * M))
    U, _, Vh = scipy.linalg.svd(M.reshape(4, 12).numpy(), full_matrices=False)
    close(W.reshape(4, 12), 2 * U @ Vh, 1e-5)
