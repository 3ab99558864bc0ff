"""Training reaches the optimum of problems whose solution has the structure.

At most 300 steps each; the optimum comes from a formula, or from numpy and scipy.
"""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch

import funcparam as fp
import funcparam.transforms
from funcparam.transforms import (
    AOL,
    IA3,
    OFT,
    Affine,
    BlockDiagonal,
    Cat,
    Chain,
    Circulant,
    DoRA,
    DoublyStochastic,
    FakeQuantize,
    Identity,
    Kronecker,
    LInfLipschitz,
    LoHa,
    LoRA,
    LowRank,
    Mask,
    Monarch,
    Orthogonal,
    Permute,
    Positive,
    Reshape,
    Skew,
    SpecialOrthogonal,
    SpectralNorm,
    Stack,
    Symmetric,
    Ternary,
    Toeplitz,
    Transpose,
    VeRA,
    WeightNorm,
    WeightStandardization,
)
from tests.transforms.test_training_constraints import STEPS, close, trained


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


def test_rotation_between_point_clouds():
    """Kabsch: of all rotations the one by the singular vectors, the last one turned if need be."""
    M = randn(3, 3)
    U, s, Vh = scipy.linalg.svd(M.numpy())
    turn = np.sign(np.linalg.det(U @ Vh))
    W = trained(SpecialOrthogonal(), torch.eye(3), lambda W: -(W * M).sum())
    close((W * M).sum(), s[0] + s[1] + turn * s[2], 1e-9)
    close(W, U @ np.diag([1, 1, turn]) @ Vh, 1e-5)


@pytest.mark.parametrize(("transform", "sign"), [(Symmetric(), 1), (Skew(), -1)], ids=str)
def test_regression_on_a_symmetric_or_skew_matrix(transform, sign):
    """Setting the gradient's part of this kind to 0 gives a Sylvester equation."""
    X, Y = randn(4, 20), randn(4, 20)
    gram, cross = (X @ X.mT).numpy(), (Y @ X.mT).numpy()
    expected = scipy.linalg.solve_sylvester(gram, gram, cross + sign * cross.T)
    close(
        trained(transform, torch.zeros(4, 4), lambda W: (W @ X - Y).square().sum()), expected, 1e-6
    )


def test_sparse_regression():
    """Each row of a masked weight is the least-squares solution on the inputs it sees."""
    X, Y = randn(5, 30), randn(3, 30)
    pattern = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).double()
    W = trained(Mask(), pattern, lambda W: (W @ X - Y).square().sum())
    for row, seen, y in zip(W, pattern == 1, Y, strict=True):
        close(row[seen], scipy.linalg.lstsq(X[seen].mT.numpy(), y.numpy())[0], 1e-6)
    assert W[pattern == 0].count_nonzero() == 0


def test_low_rank_adaptation():
    """Eckart and Young, of the change."""
    base, change = randn(6, 5), randn(6, 5)
    W = trained(LoRA(2), base, distance(base + change))
    best = (scipy.linalg.svdvals(change.numpy())[2:] ** 2).sum()
    close((W - base - change).square().sum(), best, 1e-8)


def test_normalised_weights_lose_nothing():
    """Least squares in lengths and directions."""
    X, Y = randn(5, 30), randn(4, 30)
    W = trained(WeightNorm(), randn(4, 5), lambda W: (W @ X - Y).square().sum())
    close(W, scipy.linalg.lstsq(X.mT.numpy(), Y.mT.numpy())[0].T, 1e-5)


def test_nearest_matrix_of_spectral_norm_one():
    """The largest singular value becomes 1, if the others are below it."""
    U, V = (scipy.linalg.qr(randn(4, 4).numpy())[0] for _ in range(2))
    M = torch.from_numpy((U * [3.0, 0.6, 0.4, 0.1]) @ V.T)
    W = trained(SpectralNorm(n_power_iterations=None), M, distance(M))
    close(W, (U * [1.0, 0.6, 0.4, 0.1]) @ V.T, 1e-6)


def test_pieces_with_constraints_of_their_own():
    """Least squares with some coefficients bounded and some free."""
    A, b = randn(30, 6), randn(30)
    bounds = [0.0] * 3 + [-np.inf] * 3, [np.inf] * 6
    expected = scipy.optimize.lsq_linear(A.numpy(), b.numpy(), bounds, tol=1e-14).x
    start = torch.ones(6)
    w = trained(Cat([Positive(), Identity()]), start, lambda w: (A @ w - b).square().sum())
    close(w, expected, 1e-3)
    rows = trained(
        Stack([Positive(), Identity()]),
        torch.ones(2, 6),
        lambda w: (w @ A.mT - b).square().sum(),
    )
    close(rows[0], scipy.optimize.nnls(A.numpy(), b.numpy())[0], 1e-3)
    close(rows[1], scipy.linalg.lstsq(A.numpy(), b.numpy())[0], 1e-6)


def test_every_family_has_a_problem_of_its_own():
    """All but those that are no map of their own: what is frozen, and what only composes."""
    names = set(funcparam.transforms.__all__) - {
        *("AnyTransform", "Raw", "State", "Transform", "from_constraint", "full_precision"),
        *("transform", "Frozen"),
    }
    files = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    training = "".join(text for text in files if "trained(" in text)
    assert [name for name in sorted(names) if f"{name}(" not in training] == []
