"""Calling a module with other tensors: a prepared call, torch.func's, tensordict's.

    python benchmarks/binding.py [--quick]

The network only holds its layers and runs none of them, so that binding is what is measured.
"""

import torch
from _peers import peer
from _report import Comparison, main
from torch import nn

import funcparam as fp

tensordict = peer("tensordict")

RATIOS = [("torch.func", "funcparam"), ("tensordict", "funcparam")]


class Holder(nn.Module):
    """Layers of a weight and a bias each, which nothing calls."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(count // 2))

    def forward(self, x):
        return x


def comparisons(*, quick=False):
    x = torch.zeros(1)
    for count in (10, 1000) if quick else (10, 100, 1000):
        net = Holder(count)
        params = {name: torch.ones_like(tensor) for name, tensor in net.named_parameters()}
        prepared = fp.functional_call(net)
        functions = {
            "torch.func": lambda net=net, ps=params: torch.func.functional_call(net, ps, (x,)),
            "tensordict": by_tensordict(net, x) if tensordict else None,
            "funcparam": lambda call=prepared, params=params: call(params, (x,)),
        }
        found = {name: function for name, function in functions.items() if function}
        yield Comparison({"parameters": count}, found)


def by_tensordict(net, x):
    nested = tensordict.TensorDict.from_module(net).data

    def call():
        with nested.to_module(net):
            return net(x)

    return call


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
