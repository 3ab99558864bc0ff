"""Calling a module with other tensors: funcparam's prepared call beside torch.func's.

    python benchmarks/binding.py

The layers compute nothing, so that binding is most of what is measured; the cost of running the
network by itself is subtracted from both.
"""

import statistics

import torch
from _timing import interleaved, machine
from torch import nn

import funcparam as fp


class Layer(nn.Module):
    """A weight and a bias, as most layers have, that cost nothing to apply."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x


def main():
    torch.set_num_threads(1)
    print(machine())
    print()
    print("| parameters | torch.func, us | prepared, us | ratio |")
    print("|---|---|---|---|")
    x = torch.zeros(1)
    for count in (10, 100, 1000):
        net = nn.Sequential(*[Layer() for _ in range(count // 2)])
        params = {name: torch.ones(1) for name, _ in net.named_parameters()}
        call = fp.functional_call(net)
        functions = {
            "net": lambda net=net: net(x),
            "torch": lambda net=net, params=params: torch.func.functional_call(net, params, (x,)),
            "prepared": lambda call=call, params=params: call(params, (x,)),
        }
        times = interleaved(functions, rounds=15)
        rows = list(zip(times["net"], times["torch"], times["prepared"], strict=True))
        theirs = statistics.median(b - a for a, b, _ in rows) * 1e6
        ours = statistics.median(c - a for a, _, c in rows) * 1e6
        gain = statistics.median((b - a) / (c - a) for a, b, c in rows)
        print(f"| {count} | {theirs:.0f} | {ours:.0f} | {gain:.1f} |")


if __name__ == "__main__":
    main()
