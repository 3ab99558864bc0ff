"""The gradients of 64 networks: one vmap beside a loop over modules that PyTorch parametrized.

    python benchmarks/ensemble.py [--quick]

Each network is an MLP of three Linear(32, 32), on a batch of 16 of its own.
"""

import torch
from _report import Comparison, main
from maps import KINDS
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

import funcparam as fp

RATIOS = [("PyTorch, a loop", "funcparam, one vmap")]
MEMBERS = 64


def mlp(seed):
    torch.manual_seed(seed)
    layers = [layer for _ in range(3) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*layers)


def moved(tensor):
    return tensor + 0.1 * torch.randn_like(tensor)


def setting(kind):
    transform, name, options = KINDS[kind]
    x = torch.randn(MEMBERS, 16, 32)

    theirs = [mlp(seed) for seed in range(MEMBERS)]
    for net in theirs:
        for layer in net[::2]:
            getattr(nn.utils.parametrizations, name)(layer, **options)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(moved(parameter))
        net.eval()  # neither side steps its power iteration

    net = mlp(0)
    p = fp.parametrize(net, {"*.weight": transform})
    pairs = [p.init(mlp(seed)) for seed in range(MEMBERS)]
    raw, state = tree_map(lambda *members: torch.stack(members), pairs[0], *pairs[1:])
    raw = tree_map(moved, raw)

    def loss(raw, state, x):
        return functional_call(net, p(raw, state), (x,)).square().mean()

    def loop():
        for net, batch in zip(theirs, x, strict=True):
            net(batch).square().mean().backward()

    return {
        "PyTorch, a loop": loop,
        "funcparam, one vmap": lambda: vmap(grad(loss))(raw, state, x),
    }


def comparisons(*, quick=False):
    for kind in ("matrix_exp", "weight_norm") if quick else KINDS:
        yield Comparison({"map": kind}, setting(kind))


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
