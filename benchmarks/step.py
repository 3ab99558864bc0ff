"""One training step of an MLP of 8 Linear(64, 64): funcparam beside PyTorch's module.

    python benchmarks/step.py

Forward, backward and SGD on a batch of 32. The ratio is PyTorch's time divided by funcparam's.
"shell" trains `fp.Parametrized`; "functional" calls the network by a prepared functional call.
"""

import statistics

import torch
from _timing import interleaved, machine, ratio
from maps import KINDS
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import funcparam as fp


def mlp():
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers)


def stepping(parameters, output):
    optimizer = torch.optim.SGD(parameters, lr=1e-4)

    def step():
        optimizer.zero_grad()
        output().square().mean().backward()
        optimizer.step()

    return step


def setting(kind):
    transform, name, options = KINDS[kind]
    x = torch.randn(32, 64)

    theirs = mlp()
    for layer in theirs[::2]:
        getattr(nn.utils.parametrizations, name)(layer, **options)
    p = fp.parametrize(mlp(), {"*.weight": transform})
    shell = fp.Parametrized(mlp(), p)
    for module in (theirs, shell):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    net = mlp()
    call = fp.functional_call(net)
    raw, state = p.init(net)
    raw = tree_map(lambda t: (t + 0.1 * torch.randn_like(t)).requires_grad_(), raw)
    holder = {"state": state}

    def functional():
        values, holder["state"] = p.advance(raw, holder["state"])
        return call(values, (x,))

    return {
        "torch": stepping(theirs.parameters(), lambda: theirs(x)),
        "shell": stepping(shell.parameters(), lambda: shell(x)),
        "functional": stepping(tree_leaves(raw), functional),
    }


def main():
    torch.set_num_threads(1)
    print(machine())
    print()
    print("| map | PyTorch, ms | shell, ms | ratio | functional, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        times = interleaved(setting(kind))
        middle = {name: statistics.median(found) * 1e3 for name, found in times.items()}
        gains = {name: ratio(times, "torch", name) for name in ("shell", "functional")}
        shown = {k: f"{a:.2f} ({b:.2f} to {c:.2f})" for k, (a, b, c) in gains.items()}
        print(
            f"| {kind} | {middle['torch']:.2f} | {middle['shell']:.2f} | {shown['shell']}"
            f" | {middle['functional']:.2f} | {shown['functional']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
