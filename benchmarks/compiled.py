"""Compiled by inductor: steady state and cold compile time, beside PyTorch's module.

    python benchmarks/compiled.py [--quick]

Steady state: forward and backward of an MLP of 8 Linear(64, 64), in training mode, after both sides
were compiled. Cold: CPU seconds, those of the C++ compiler included, until a model of 24 layers has
made its first forward and backward, all caches off and nothing compiled before.
"""

import argparse
import os
import statistics

import torch
from _timing import interleaved, machine, ratio
from maps import KINDS
from torch import nn

import funcparam as fp

COLD_LAYERS = 24


def pair(kind, layers, width=64):
    """PyTorch's model and ours, with equal layers, away from their initial values."""
    transform, name, options = KINDS[kind]

    def mlp():
        torch.manual_seed(0)
        made = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*made)

    theirs = mlp()
    for layer in theirs[::2]:
        getattr(nn.utils.parametrizations, name)(layer, **options)
    ours = fp.Parametrized(mlp(), fp.parametrize(mlp(), {"*.weight": transform}))
    for module in (theirs, ours):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return {"torch": theirs, "funcparam": ours}


def training(model, x):
    """Forward and backward, compiled at the first call."""
    compiled = torch.compile(model)
    parameters = list(model.parameters())

    def step():
        loss = compiled(x).square().mean()
        torch.autograd.grad(loss, parameters)

    return step


def steady(kind, layers=8):
    """Both sides, to be timed after they were called once."""
    torch._dynamo.reset()
    x = torch.randn(32, 64)
    return {name: training(model, x) for name, model in pair(kind, layers).items()}


def cpu_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def cold(kind, layers=COLD_LAYERS):
    """CPU seconds of the first step of each side."""
    x = torch.randn(32, 64)
    found = {}
    for name, model in pair(kind, layers).items():
        torch._dynamo.reset()
        step = training(model, x)
        start = cpu_seconds()
        step()
        found[name] = cpu_seconds() - start
    return found


def measure(kinds=tuple(KINDS), quick=False):
    """One row for each map, as dicts."""
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # in this process, where its time can be read
    cold("weight_norm", 1)  # what any first compilation loads
    for kind in kinds:
        times = interleaved(steady(kind), 5 if quick else 11)
        first = cold(kind, 8 if quick else COLD_LAYERS)
        yield {"map": kind, "seconds": times, "cold": first}


def report(*, quick=False):
    """All figures, and their table."""
    rows = list(measure(("weight_norm",) if quick else tuple(KINDS), quick))
    lines = [
        "| map | PyTorch, ms | funcparam, ms | ratio | cold: PyTorch, s | funcparam, s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs, ours = (statistics.median(row["seconds"][k]) * 1e3 for k in ("torch", "funcparam"))
        gain, low, high = ratio(row["seconds"], "torch", "funcparam")
        first = row["cold"]
        lines.append(
            f"| {row['map']} | {theirs:.2f} | {ours:.2f} | {gain:.2f} ({low:.2f} to {high:.2f})"
            f" | {first['torch']:.0f} | {first['funcparam']:.0f}"
            f" | {first['torch'] / first['funcparam']:.2f} |"
        )
    return rows, "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one map, 8 layers cold")
    torch.set_num_threads(1)
    print(f"{machine()}\n\n{report(quick=parser.parse_args().quick)[1]}")


if __name__ == "__main__":
    main()
