"""Reading and registering: funcparam.compat beside torch's own module, in one run."""

import statistics
import time

import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize as torch_parametrize

from funcparam.compat import parametrizations, parametrize


class Double(nn.Module):
    def forward(self, X):
        return 2 * X


def once(function, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def compare(label, theirs, ours, repeats):
    """The medians of interleaved rounds, so that a busy machine slows both."""
    rounds = [(once(theirs, repeats), once(ours, repeats)) for _ in range(15)]
    show(label, rounds)


def show(label, rounds):
    a, b = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"{label:38} torch {a * 1e6:9.2f} us   compat {b * 1e6:9.2f} us   ratio {ratio:5.2f}")


def reading(label, register):
    def layer(api, functions):
        torch.manual_seed(0)
        return register(api, functions, nn.Linear(64, 64))

    a = layer(torch_parametrize, torch_parametrizations)
    b = layer(parametrize, parametrizations)
    compare(f"read {label}, just registered", lambda: a.weight, lambda: b.weight, 300)
    for module in (a, b):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    compare(f"read {label}, trained", lambda: a.weight, lambda: b.weight, 300)


def registering(label, register):
    """Registering alone is timed; making the modules and removing are not."""

    def of(api, functions):
        def run():
            modules = [nn.Linear(8, 8) for _ in range(100)]
            start = time.perf_counter()
            for module in modules:
                register(api, functions, module)
            return time.perf_counter() - start

        return run

    theirs, ours = of(torch_parametrize, torch_parametrizations), of(parametrize, parametrizations)
    rounds = [(theirs(), ours()) for _ in range(30)]
    show(f"register 100 {label}", rounds)


def main():
    torch.set_num_threads(1)
    kinds = {
        "a module": lambda api, _, m: api.register_parametrization(m, "weight", Double()),
        "orthogonal": lambda _, functions, m: functions.orthogonal(m),
        "weight_norm": lambda _, functions, m: functions.weight_norm(m),
        "spectral_norm": lambda _, functions, m: functions.spectral_norm(m),
    }
    for label, register in kinds.items():
        reading(label, register)
    for label, register in kinds.items():
        registering(label, register)


if __name__ == "__main__":
    main()
