"""Training reaches the optimum of problems whose solution lies on the constraint.

At most 300 steps each; the optimum comes from a formula, or from scipy.
"""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

import funcparam as fp
from funcparam.transforms import (
    CholeskyFactor,
    CorrelationCholesky,
    Interval,
    LowerBound,
    Ordered,
    Positive,
    PositiveDefinite,
    PSDLowRank,
    Simplex,
    StableDiagonal,
    Triangular,
    UnitNorm,
    UpperBound,
)

STEPS = 300


def trained(transform, start, loss):
    """Minimise `loss` of a value by L-BFGS over raw; the value, and its violation."""
    tree = {"w": start.double() if not start.is_complex() else start.to(torch.complex128)}
    p = fp.parametrize(tree, {"w": transform})
    raw, state = p.init(tree)
    parts = [raw["w"]] if isinstance(raw["w"], torch.Tensor) else list(raw["w"].values())
    for part in parts:
        part.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parts,
        max_iter=STEPS,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        out = loss(p(raw, state)["w"])
        out.backward()
        return out

    optimizer.step(closure)
    value = p(raw, state)["w"].detach()
    assert not p.violation({"w": value}, state)["w"] > 1e-12  # some are not measured
    return value


def close(actual, expected, atol):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


def gaussian_nll(S):
    """Of zero-mean observations with second moment S, as a function of their covariance."""

    def loss(W):
        L = torch.linalg.cholesky(W)
        return 2 * L.diagonal().log().sum() + torch.cholesky_solve(S, L).trace()

    return loss


def second_moment(n):
    x = torch.randn(200, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
    return x.mT @ x / len(x)


def test_covariance_estimation():
    """The maximum-likelihood covariance is the second moment."""
    S = second_moment(5)
    W = trained(PositiveDefinite(), torch.eye(5), gaussian_nll(S))
    close(W, S, 1e-4)


def test_covariance_estimation_with_a_floor():
    """With W >= eps the optimum clips the eigenvalues of the second moment."""
    S = second_moment(4)
    spectrum, vectors = scipy.linalg.eigh(S.numpy())
    floor = spectrum[1] * 1.5
    expected = torch.from_numpy((vectors * spectrum.clip(floor)) @ vectors.T)
    W = trained(PositiveDefinite(floor), torch.eye(4) * 2 * floor, gaussian_nll(S))
    close(gaussian_nll(S)(W), gaussian_nll(S)(expected), 1e-4)


@pytest.mark.parametrize("n", [3, 6])
def test_nearest_correlation_matrix(n):
    """Against alternating projections with Dykstra's correction (Higham 2002)."""
    if n == 3:
        A = np.array([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]])
    else:
        A = np.random.default_rng(0).uniform(-1, 1, (n, n))
        A = np.tril(A, -1) + np.tril(A, -1).T + np.eye(n)
    assert scipy.linalg.eigvalsh(A)[0] < -0.1
    Y, correction = A.copy(), np.zeros_like(A)
    for _ in range(3000):
        R = Y - correction
        spectrum, vectors = scipy.linalg.eigh(R)
        X = (vectors * spectrum.clip(0)) @ vectors.T
        correction = X - R
        Y = X.copy()
        np.fill_diagonal(Y, 1)
    if n == 3:
        np.testing.assert_allclose(Y[0], [1, 0.7607, 0.1573], atol=5e-5)  # the paper's numbers
    target = torch.from_numpy(A)
    L = trained(CorrelationCholesky(), torch.eye(n), lambda L: (L @ L.mT - target).square().sum())
    close((L @ L.mT).diagonal(), torch.ones(n, dtype=torch.float64), 1e-12)
    close((L @ L.mT - target).square().sum(), ((Y - A) ** 2).sum(), 1e-6)
    close(L @ L.mT, Y, 1e-3)


def test_nearest_matrix_of_low_rank():
    """From a random start to the top eigenpairs (Eckart and Young)."""
    A = torch.randn(8, 8, dtype=torch.float64)
    A = A + A.mT
    spectrum, vectors = scipy.linalg.eigh(A.numpy())
    expected = (vectors[:, -3:] * spectrum[-3:]) @ vectors[:, -3:].T
    start = torch.randn(8, 3)
    W = trained(PSDLowRank(3), start @ start.mT, lambda W: (W - A).square().sum())
    close(W, expected, 1e-6)


@pytest.mark.parametrize("map", ["softmax", "stick_breaking"])
@pytest.mark.parametrize("sparse", [False, True])
def test_least_squares_on_the_simplex(map, sparse):
    A, n = torch.randn(30, 6, dtype=torch.float64), 6
    weights = torch.randn(n, dtype=torch.float64).softmax(0)
    b = A @ weights + 0.1 * torch.randn(30, dtype=torch.float64)
    if sparse:  # the optimum is on the boundary
        b = b - A @ (3 * torch.eye(n, dtype=torch.float64)[0])

    def loss(w):
        return (A @ w - b).square().mean()

    found = scipy.optimize.minimize(
        lambda w: loss(torch.from_numpy(w)).item(),
        np.full(n, 1 / n),
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    assert (found.x.min() < 1e-6) == sparse
    w = trained(Simplex(map), torch.full((n,), 1 / n), loss)
    close(loss(w), torch.tensor(found.fun, dtype=torch.float64), 1e-6)
    close(w, found.x, 1e-3)


def test_isotonic_regression():
    """Levels that pool are reached from inside: their steps shrink to 0."""
    y = torch.linspace(-1, 1, 20, dtype=torch.float64).pow(3)
    y = y + 0.3 * torch.randn(20, dtype=torch.float64)
    expected = torch.from_numpy(scipy.optimize.isotonic_regression(y.numpy()).x)
    assert (expected.diff() == 0).any()
    w = trained(Ordered(), torch.linspace(-1, 1, 20), lambda w: (w - y).square().sum())
    close((w - y).square().sum(), (expected - y).square().sum(), 1e-3)
    close(w, expected, 1e-2)


@pytest.mark.parametrize("map", ["softplus", "exp", "square"])
def test_nonnegative_least_squares(map):
    A = torch.randn(30, 6, dtype=torch.float64)
    b = torch.randn(30, dtype=torch.float64)
    expected, _ = scipy.optimize.nnls(A.numpy(), b.numpy())
    assert (expected == 0).any()
    assert (expected > 0).any()
    w = trained(Positive(map), torch.ones(6), lambda w: (A @ w - b).square().sum())
    close(w, expected, 1e-3)


@pytest.mark.parametrize(
    ("transform", "bounds"),
    [
        (LowerBound(-0.1), (-0.1, np.inf)),
        (UpperBound(0.1), (-np.inf, 0.1)),
        (Interval(-0.1, 0.1), (-0.1, 0.1)),
    ],
    ids=str,
)
def test_bounded_least_squares(transform, bounds):
    A = torch.randn(30, 6, dtype=torch.float64)
    b = torch.randn(30, dtype=torch.float64)
    expected = scipy.optimize.lsq_linear(A.numpy(), b.numpy(), bounds, tol=1e-14).x
    w = trained(transform, torch.zeros(6), lambda w: (A @ w - b).square().sum())
    close(w, expected, 1e-3)


def test_rayleigh_quotient():
    """On the sphere the least value of x^T A x is the least eigenvalue."""
    A = torch.randn(10, 10, dtype=torch.float64)
    A = A + A.mT
    x = trained(UnitNorm(), torch.randn(10), lambda x: x @ A @ x)
    close(x @ A @ x, scipy.linalg.eigvalsh(A.numpy())[0], 1e-9)


def test_factorisations():
    """Cholesky and LU by descent: both are unique."""
    S = second_moment(4) + torch.eye(4, dtype=torch.float64)
    L = trained(CholeskyFactor(), torch.eye(4), lambda L: (L @ L.mT - S).square().sum())
    close(L, scipy.linalg.cholesky(S.numpy(), lower=True), 1e-5)
    b = torch.randn(4, 4, dtype=torch.float64)
    U = trained(
        Triangular(upper=True), torch.eye(4), lambda U: (L @ U - L @ b.triu()).square().sum()
    )
    close(U, b.triu(), 1e-5)


@pytest.mark.parametrize("pairs", [False, True])
def test_oscillators_are_identified(pairs):
    """The poles of a damped oscillation, from its samples; they start too short and too slow."""
    poles = torch.polar(torch.tensor([0.95, 0.8]), torch.tensor([0.5, 1.5])).to(torch.complex128)
    start = torch.polar(torch.tensor([0.7, 0.6]), torch.tensor([0.6, 1.2]))
    times = torch.arange(25)
    seen = poles.unsqueeze(-1).pow(times).sum(0).real

    def loss(w):
        poles = torch.view_as_complex(w) if pairs else w
        return (poles.unsqueeze(-1).pow(times).sum(0).real - seen).square().sum()

    found = trained(StableDiagonal(pairs), torch.view_as_real(start) if pairs else start, loss)
    close(torch.view_as_complex(found) if pairs else found, poles, 1e-6)
