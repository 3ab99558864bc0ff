"""Moving the base point at every step is Riemannian optimization, and so is projection.

The formulas are those of the literature, in matrices of the full side; geoopt's own where it can
be imported.
"""

import pytest
import scipy.linalg
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import Grassmann, Orthogonal, Stiefel, UnitNorm

RATE, STEPS = 0.005, 40
TALL, SQUARE = (7, 3), (5, 5)
EXACT = {"rtol": 0, "atol": 1e-10}


def frame(shape):
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64)).Q


def brockett(shape):
    """A function of a frame whose minimum is one frame, up to signs: eigenvectors in an order."""
    S = torch.randn(shape[0], shape[0], dtype=torch.float64)
    order = torch.arange(1, shape[1] + 1, dtype=torch.float64)
    return lambda W: -(W.mT @ (S + S.mT) @ W).diagonal().mul(order).sum()


def gradient(cost, W):
    return torch.func.grad(cost)(W)


def trajectory(step, W):
    points = []
    for _ in range(STEPS):
        W = step(W)
        points.append(W)
    return torch.stack(points)


def rebased(transform, cost, start, rate=RATE):
    """SGD on raw, and a move of the base point after each step."""
    p = fp.parametrize({"w": start}, {"w": transform})
    raw, state = p.init({"w": start})
    optimizer = torch.optim.SGD(fp.trainable(raw), lr=rate)
    points = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        cost(p(raw, state)["w"]).backward()
        optimizer.step()
        raw, state = fp.move(p, p, raw, state, optimizer)
        points.append(p(raw, state)["w"].detach())
    return torch.stack(points)


def projected(transform, cost, start, optimizer_of):
    """Steps of a plain weight along the tangent space, and a projection after each."""
    net = nn.Module()
    net.weight = nn.Parameter(start.clone())
    p = fp.parametrize(net, {"weight": transform})
    optimizer = optimizer_of(net.parameters())
    fp.tangent_before(optimizer, p, net)
    fp.project_after(optimizer, p, net)
    points = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        cost(net.weight).backward()
        optimizer.step()
        points.append(net.weight.detach().clone())
    return torch.stack(points)


def cayley(S):
    eye = torch.eye(len(S), dtype=S.dtype)
    return torch.linalg.solve(eye - S / 2, eye + S / 2)


def expm(S):
    # torch.linalg.matrix_exp is off by 5e-12 where the norm of S is about 0.04
    return torch.tensor(scipy.linalg.expm(S.numpy()))


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def q_factor(X):
    Q, R = torch.linalg.qr(X)
    return Q * R.diagonal().sign()


def skew(X):
    return (X - X.mT) / 2


def tangent(W, G):
    """Edelman, Arias and Smith (1998), equation 2.4: the metric of the space around."""
    return W @ skew(W.mT @ G) + G - W @ (W.mT @ G)


def generator(W, G):
    """Wen and Yin (2013): the skew matrix that moves W down the canonical metric."""
    return G @ W.mT - W @ G.mT


def tilt(W, K):
    """The Cayley transform of the generator of K, which is orthogonal to W."""
    return cayley(K @ W.mT - W @ K.mT)


def stiefel_retraction(W, X):
    K = X - W @ (W.mT @ X)
    return tilt(W, K) @ W @ cayley(skew(W.mT @ X))


def triangular(W, G):
    """The step of the Q factor's chart: of the generator the lower triangle counts."""
    return W @ (2 * skew(W.mT @ G)).tril(-1) + G - W @ (W.mT @ G)


BY_HAND = {
    "stiefel": (Stiefel(), lambda W, G: stiefel_retraction(W, -RATE * tangent(W, G))),
    "grassmann": (Grassmann(), lambda W, G: tilt(W, -RATE * (G - W @ (W.mT @ G))) @ W),
    "cayley": (Orthogonal("cayley"), lambda W, G: cayley(-RATE * generator(W, G)) @ W),
    "exponential": (
        Orthogonal("matrix_exp"),
        lambda W, G: expm(-RATE * generator(W, G)) @ W,
    ),
    "qr": (Orthogonal("qr"), lambda W, G: q_factor(W - RATE * triangular(W, G))),
    "polar": (Orthogonal("newton_schulz"), lambda W, G: polar(W - RATE * tangent(W, G))),
}


# of full dimension there is one subspace only
CASES = [(name, TALL) for name in BY_HAND] + [(n, SQUARE) for n in BY_HAND if n != "grassmann"]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_rebase_at_every_step_is_riemannian_descent_on_frames(name, shape):
    transform, step = BY_HAND[name]
    cost, start = brockett(shape), frame(shape)
    expected = trajectory(lambda W: step(W, gradient(cost, W)), start)
    found = rebased(transform, cost, start)
    torch.testing.assert_close(found, expected, **EXACT)
    assert cost(found[-1]) < cost(start) - 1


def on_the_sphere():
    start = nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64), dim=-1)
    target = torch.randn(4, 6, dtype=torch.float64)
    return start, lambda W: ((W - target).square().sum(-1) * W[:, 0].cos()).sum()


def test_rebase_and_projection_are_riemannian_descent_on_spheres():
    start, cost = on_the_sphere()

    def step(W):
        G = gradient(cost, W)
        X = W - RATE * (G - W * (W * G).sum(-1, keepdim=True))
        return X / X.norm(dim=-1, keepdim=True)

    expected = trajectory(step, start)
    torch.testing.assert_close(rebased(UnitNorm(), cost, start), expected, **EXACT)
    found = projected(UnitNorm(), cost, start, lambda ws: torch.optim.SGD(ws, lr=RATE))
    torch.testing.assert_close(found, expected, **EXACT)


def test_projection_is_riemannian_descent_with_the_polar_retraction():
    cost, start = brockett(TALL), frame(TALL)
    expected = trajectory(lambda W: polar(W - RATE * tangent(W, gradient(cost, W))), start)
    found = projected(Stiefel(), cost, start, lambda ws: torch.optim.SGD(ws, lr=RATE))
    torch.testing.assert_close(found, expected, **EXACT)


def by_geoopt(manifold, cost, start, rate):
    geoopt = pytest.importorskip("geoopt")
    W = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    # what a step loses of orthogonality would grow; to stabilize projects it away
    optimizer = geoopt.optim.RiemannianSGD([W], lr=rate, stabilize=1)
    points = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        cost(W).backward()
        optimizer.step()
        points.append(W.detach().clone())
    return torch.stack(points)


def test_geoopt_on_spheres():
    geoopt = pytest.importorskip("geoopt")
    start, cost = on_the_sphere()
    expected = by_geoopt(geoopt.Sphere(), cost, start, RATE)
    torch.testing.assert_close(rebased(UnitNorm(), cost, start), expected, **EXACT)


# How far a rate goes depends on the metric, and in geoopt's retraction by Cayley's transform the
# turn within the span counts twice.
GEOOPT = {
    "canonical, cayley": ("CanonicalStiefel", Orthogonal("cayley"), 1 / 2),
    "canonical, stiefel": ("CanonicalStiefel", Stiefel(), 1 / 4),
    "euclidean, exponential": ("EuclideanStiefelExact", Orthogonal("matrix_exp"), 2),
}


@pytest.mark.parametrize(("manifold", "transform", "factor"), GEOOPT.values(), ids=GEOOPT)
def test_geoopt_on_orthogonal_matrices(manifold, transform, factor):
    geoopt = pytest.importorskip("geoopt")
    cost, start = brockett(SQUARE), frame(SQUARE)
    expected = by_geoopt(getattr(geoopt, manifold)(), cost, start, factor * RATE)
    torch.testing.assert_close(rebased(transform, cost, start), expected, **EXACT)


def test_geoopt_on_frames_with_other_retractions():
    geoopt = pytest.importorskip("geoopt")

    class Retracted(geoopt.EuclideanStiefel):
        def __init__(self, retraction):
            super().__init__()
            self.retr = retraction

    cost, start = brockett(TALL), frame(TALL)
    tilted = by_geoopt(Retracted(stiefel_retraction), cost, start, RATE)
    torch.testing.assert_close(rebased(Stiefel(), cost, start), tilted, **EXACT)
    nearest = by_geoopt(Retracted(lambda W, X: polar(W + X)), cost, start, RATE)
    torch.testing.assert_close(rebased(Orthogonal("newton_schulz"), cost, start), nearest, **EXACT)
    found = projected(Stiefel(), cost, start, lambda ws: torch.optim.SGD(ws, lr=RATE))
    torch.testing.assert_close(found, nearest, **EXACT)
