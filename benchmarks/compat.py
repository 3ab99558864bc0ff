"""Reading, registering and removing: funcparam.compat beside PyTorch's own module.

    python benchmarks/compat.py [--quick]

A weight of 64 x 64 is read in training, without its backward; 100 layers of 8 x 8 are parametrized,
and plain again.
"""

import torch
from _report import Comparison, main
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize as torch_parametrize

from funcparam.compat import parametrizations, parametrize

RATIOS = [("PyTorch", "compat")]
SIDES = {
    "PyTorch": (torch_parametrize, torch_parametrizations),
    "compat": (parametrize, parametrizations),
}


class Double(nn.Module):
    def forward(self, X):
        return 2 * X


KINDS = {
    "a module": lambda api, _, m: api.register_parametrization(m, "weight", Double()),
    "orthogonal": lambda _, functions, m: functions.orthogonal(m),
    "weight_norm": lambda _, functions, m: functions.weight_norm(m),
    "spectral_norm": lambda _, functions, m: functions.spectral_norm(m),
}


def reading(register, *, trained):
    def reader(api, functions):
        torch.manual_seed(0)
        layer = register(api, functions, nn.Linear(64, 64))
        if trained:
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return lambda: layer.weight

    return {side: reader(*modules) for side, modules in SIDES.items()}


def registering(register):
    def both_ways(api, functions):
        layers = [nn.Linear(8, 8) for _ in range(100)]

        def run():
            for layer in layers:
                register(api, functions, layer)
                api.remove_parametrizations(layer, "weight")

        return run

    return {side: both_ways(*modules) for side, modules in SIDES.items()}


def comparisons(*, quick=False):
    for name, register in KINDS.items():
        if not quick:
            yield Comparison(
                {"what": f"read {name}, just registered"}, reading(register, trained=False)
            )
        yield Comparison({"what": f"read {name}, trained"}, reading(register, trained=True))
    for name, register in KINDS.items():
        yield Comparison({"what": f"register and remove 100 {name}"}, registering(register))


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
