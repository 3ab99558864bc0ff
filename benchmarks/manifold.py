"""A training step on a manifold: funcparam's three ways beside geoopt's Riemannian optimizers.

    python benchmarks/manifold.py [--quick]

One weight, a linear cost, so that next to nothing is spent on the network: frames, which are
matrices with orthonormal columns, and rows of unit length. "trivialized" trains raw, "rebased" also
moves the base point after each step, moments included, and "projected" trains the weight itself,
along its tangent space, and projects it.
"""

from functools import partial

import geoopt
import torch
from _report import Comparison, main
from torch import nn

import funcparam as fp
from funcparam.transforms import Stiefel, UnitNorm

RATIOS = [("geoopt", "trivialized"), ("geoopt", "rebased"), ("geoopt", "projected")]
MANIFOLDS = {
    "frames": (Stiefel(), geoopt.EuclideanStiefel(), [(64, 8), (256, 32), (1024, 32)]),
    "unit rows": (UnitNorm(), geoopt.Sphere(), [(64, 64), (256, 256), (1024, 256)]),
}
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, geoopt.optim.RiemannianSGD),
    "momentum": (
        partial(torch.optim.SGD, momentum=0.9),
        partial(geoopt.optim.RiemannianSGD, momentum=0.9),
    ),
    "Adam": (torch.optim.Adam, geoopt.optim.RiemannianAdam),
}


def stepping(optimizer, weight, slope, after=lambda: None):
    def step():
        optimizer.zero_grad()
        (weight() * slope).sum().backward()
        optimizer.step()
        after()

    return step


def trivialized(transform, start, slope, make, *, rebase=False):
    p = fp.parametrize({"w": start}, {"w": transform})
    raw, state = p.init({"w": start})
    optimizer = make(fp.trainable(raw))

    def move():
        nonlocal raw, state
        raw, state = fp.move(p, p, raw, state, optimizer)

    after = move if rebase else lambda: None
    return stepping(optimizer, lambda: p(raw, state)["w"], slope, after)


def projected(transform, start, slope, make):
    net = nn.ParameterDict({"w": start.clone()})
    p = fp.parametrize(net, {"w": transform})
    optimizer = make(net.parameters())
    fp.tangent_before(optimizer, p, net)
    fp.project_after(optimizer, p, net)
    return stepping(optimizer, lambda: net["w"], slope)


def by_geoopt(manifold, start, slope, make):
    weight = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    return stepping(make([weight]), lambda: weight, slope)


def setting(kind, shape, by):
    transform, manifold, _ = MANIFOLDS[kind]
    ours, theirs = (partial(make, lr=1e-3) for make in OPTIMIZERS[by])
    torch.manual_seed(0)
    slope = torch.randn(shape) / shape[0] ** 0.5
    start = transform.project(torch.randn(shape), {})
    return {
        "geoopt": by_geoopt(manifold, start, slope, theirs),
        "trivialized": trivialized(transform, start, slope, ours),
        "rebased": trivialized(transform, start, slope, ours, rebase=True),
        "projected": projected(transform, start, slope, ours),
    }


def comparisons(*, quick=False):
    for kind, (_, _, shapes) in MANIFOLDS.items():
        for m, n in shapes[:1] if quick else shapes:
            for by in OPTIMIZERS:
                case = {"manifold": kind, "shape": f"{m} x {n}", "optimizer": by}
                yield Comparison(case, setting(kind, (m, n), by))


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
