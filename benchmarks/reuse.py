"""A weight that is used many times in one step: one evaluation, beside `cached()` and beside none.

    python benchmarks/reuse.py [--quick]

A recurrent network, h <- tanh(x_t + W h), of width 64 unrolled 30 times, batch 16; forward and
backward in training mode. PyTorch's module computes W at each read, or once inside of
`parametrize.cached()`; funcparam computes it once a step.
"""

import torch
from _report import Comparison, main
from maps import KINDS
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

import funcparam as fp

RATIOS = [("PyTorch", "funcparam"), ("PyTorch, cached()", "funcparam")]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.Linear(64, 64, bias=False)

    def forward(self, xs):
        h = torch.zeros_like(xs[0])
        for x in xs:
            h = torch.tanh(x + self.cell(h))
        return h


def setting(kind):
    transform, name, options = KINDS[kind]
    xs = torch.randn(30, 16, 64).unbind()
    theirs = Recurrent()
    getattr(nn.utils.parametrizations, name)(theirs.cell, **options)
    net = Recurrent()
    p = fp.parametrize(net, {"cell.weight": transform})
    call = fp.functional_call(net)
    raw, state = p.init(net)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    raw = tree_map(lambda t: (t + 0.1 * torch.randn_like(t)).requires_grad_(), raw)
    trained, holder = list(theirs.parameters()), {"state": state}

    def plain():
        torch.autograd.grad(theirs(xs).sum(), trained)

    def cached():
        with parametrize.cached():
            plain()

    def ours():
        values, holder["state"] = p.advance(raw, holder["state"])
        torch.autograd.grad(call(values, (xs,)).sum(), tree_leaves(raw))

    return {"PyTorch": plain, "PyTorch, cached()": cached, "funcparam": ours}


def comparisons(*, quick=False):
    for kind in ("cayley", "spectral_norm") if quick else KINDS:
        yield Comparison({"map": kind}, setting(kind))


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
