"""Compiled by inductor: steady state and cold compile time, beside PyTorch's module.

    python benchmarks/compiled.py [--quick]

Forward and backward in training mode, of MLPs of 8, 24, 32 and 96 layers and of the transformer of
step.py. Steady state: after both sides were compiled. Cold: CPU seconds, those of the C++ compiler
included, until the first forward and backward were made; nothing comes from a cache. The first net
of each map loads what its compilation needs, for PyTorch's side, and so has no cold time.
"""

import argparse
import os
import statistics

import torch
from _timing import interleaved, machine, ratio
from maps import KINDS
from step import transformer
from torch import nn

import funcparam as fp

NETS = {
    "8 x 64": (lambda: mlp(8, 64), (32, 64)),
    "24 x 64": (lambda: mlp(24, 64), (32, 64)),
    "32 x 16": (lambda: mlp(32, 16), (32, 16)),
    "96 x 32": (lambda: mlp(96, 32), (32, 32)),
    "transformer": (transformer, (8, 32, 256)),
}
HEAD = (
    "| map | net | PyTorch, ms | funcparam, ms | PyTorch / funcparam"
    " | cold: PyTorch, s | funcparam, s | PyTorch / funcparam |"
)
FAILING = "householder"  # inductor writes C++ for PyTorch's that does not compile


def mlp(layers, width):
    torch.manual_seed(0)
    made = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*made)


def pair(kind, make):
    """PyTorch's model and ours, with equal layers, away from their initial values."""
    transform, name, options = KINDS[kind]
    pattern = "*.linear?.weight" if make is transformer else "*.weight"
    p = fp.parametrize(make(), {pattern: transform})
    models = {}
    if kind != FAILING:
        models["torch"] = make()
        for weight in p:
            layer = models["torch"].get_submodule(weight.rpartition(".")[0])
            getattr(nn.utils.parametrizations, name)(layer, **options)
    models["funcparam"] = fp.Parametrized(make(), p)
    for model in models.values():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return models


def training(model, x):
    """Forward and backward, compiled at the first call."""
    compiled = torch.compile(model)
    parameters = list(model.parameters())

    def step():
        loss = compiled(x).square().mean()
        torch.autograd.grad(loss, parameters)

    return step


def cpu_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(kind, which, rounds):
    """CPU seconds of the first step of each side, and seconds of later ones."""
    make, shape = NETS[which]
    x = torch.randn(shape)
    torch._dynamo.reset()
    cold, steps = {}, {}
    for name, model in pair(kind, make).items():
        steps[name] = training(model, x)
        start = cpu_seconds()
        steps[name]()
        cold[name] = cpu_seconds() - start
    return {"map": kind, "net": which, "cold": cold, "seconds": interleaved(steps, rounds)}


def report(*, quick=False):
    """All figures, and their table."""
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # in this process, where its time can be read
    measure("weight_norm", "8 x 64", 1)  # what any first compilation loads
    kinds, nets = (("weight_norm",), ("8 x 64",)) if quick else (KINDS, NETS)
    rounds = 5 if quick else 11
    rows = [measure(kind, which, rounds) for which in nets for kind in kinds]
    return rows, "\n".join([HEAD, "| --- " * 8 + "|", *map(_line, rows)])


def _line(row):
    seconds, cold = row["seconds"], row["cold"]
    cells = [row["map"], row["net"], _ms(seconds, "torch"), _ms(seconds, "funcparam")]
    if "torch" in seconds:
        cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio(seconds, "torch", "funcparam")))
        cells += [f"{cold['torch']:.0f}", f"{cold['funcparam']:.0f}"]
        cells.append(f"{cold['torch'] / cold['funcparam']:.2f}")
    else:
        cells += ["", "", f"{cold['funcparam']:.0f}", ""]
    if row["net"] == next(iter(NETS)):
        cells[-3:] = [""] * 3
    return f"| {' | '.join(cells)} |"


def _ms(seconds, name):
    return f"{statistics.median(seconds[name]) * 1e3:.2f}" if name in seconds else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one map, 8 layers")
    torch.set_num_threads(1)
    print(f"{machine()}\n\n{report(quick=parser.parse_args().quick)[1]}")


if __name__ == "__main__":
    main()
