"""An inner loop that adapts a head: with every map at each step, and with those of the head alone.

    python benchmarks/part.py

ANIL (Raghu et al., arXiv 1909.09157): five inner steps adapt the last layer of an MLP of width 64,
whose two other square weights are orthogonal; the meta-gradient is by all of raw.
"""

import torch
from _report import Comparison, main
from torch import nn
from torch.func import functional_call, grad
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import funcparam as fp
from funcparam.transforms import Orthogonal, WeightNorm

RATIOS = [("whole", "part")]
STEPS, RATE = 5, 0.1


def comparisons(*, quick=False):
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)
    net = nn.Sequential(*layers)
    p = fp.parametrize(net, {"[02].weight": Orthogonal(), "4.weight": WeightNorm()})
    raw, state = p.init(net)
    leaves, spec = tree_flatten(tree_map(lambda t: t + 0.1 * torch.randn_like(t), raw))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    raw = tree_unflatten(leaves, spec)
    head, body = p.split("4.*")
    x, y = torch.randn(2, 25, 64), torch.randn(2, 25, 5)

    def error(values, i):
        return (functional_call(net, values, (x[i],)) - y[i]).square().mean()

    def adapted(values):
        own = head.of(raw)
        for _ in range(STEPS):
            step = grad(lambda own: error(values(own), 0))(own)
            own = tree_map(lambda w, g: w - RATE * g, own, step)
        return torch.autograd.grad(error(values(own), 1), leaves)

    def by_part():
        fixed = body(body.of(raw), body.of(state))
        return adapted(lambda own: fixed | head(own))

    def whole():
        return adapted(lambda own: p(raw | own, state))

    torch.testing.assert_close(by_part(), whole())
    yield Comparison({"inner steps": STEPS}, {"whole": whole, "part": by_part})


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
