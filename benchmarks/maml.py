"""The meta-gradient of second-order MAML: all tasks in one vmap, beside higher and TorchOpt.

    python benchmarks/maml.py

Sine waves as in Finn et al., arXiv 1703.03400: a 40-40 network with weight norm, 5 inner steps, 25
tasks. The peers loop over tasks, as their documentation does, with weight norm written by hand in
composed operations: PyTorch's own has wrong second derivatives. All gradients are compared first.
"""

import torch
from _peers import peer
from _report import Comparison, main
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import linear
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import funcparam as fp
from funcparam.transforms import WeightNorm

higher, torchopt = peer("higher"), peer("torchopt")

RATIOS = [("higher", "funcparam"), ("TorchOpt", "funcparam")]
TASKS, POINTS, STEPS, RATE = 25, 10, 5, 0.01


class Normed(nn.Module):
    """A linear layer with weight norm, without any library."""

    def __init__(self, layer):
        super().__init__()
        self.magnitude = nn.Parameter(layer.weight.detach().norm(dim=1, keepdim=True))
        self.direction = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x):
        scale = self.magnitude / self.direction.norm(dim=1, keepdim=True)
        return linear(x, self.direction * scale, self.bias)


def network(wrap=lambda layer: layer):
    torch.manual_seed(0)
    layers = [nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 1)]
    a, b, c = map(wrap, layers)
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)


def tasks():
    torch.manual_seed(1)
    amplitude, phase = 0.1 + 4.9 * torch.rand(TASKS, 1, 1), 3.14 * torch.rand(TASKS, 1, 1)
    x = 10 * torch.rand(TASKS, 2 * POINTS, 1) - 5
    y = amplitude * torch.sin(x + phase)
    return x[:, :POINTS], y[:, :POINTS], x[:, POINTS:], y[:, POINTS:]


def by_vmap(batch):
    net = network()
    p = fp.parametrize(net, {"*.weight": WeightNorm()})
    raw, _ = p.init(net)
    leaves, spec = tree_flatten(raw)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    raw = tree_unflatten(leaves, spec)
    order = [
        raw[f"{i}.{rest}"] if rest == "bias" else raw[f"{i}.weight"][rest]
        for i in (0, 2, 4)
        for rest in ("magnitude", "direction", "bias")
    ]

    def error(raw, x, y):
        return (functional_call(net, p(raw), (x,)) - y).square().mean()

    def adapted(raw, x, y, x_query, y_query):
        for _ in range(STEPS):
            step = grad(error)(raw, x, y)
            raw = tree_map(lambda w, g: w - RATE * g, raw, step)
        return error(raw, x_query, y_query)

    def run():
        error = vmap(adapted, (None, 0, 0, 0, 0))(raw, *batch).mean()
        return torch.autograd.grad(error, order)

    return run


def by_higher(batch):
    net = network(Normed)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)

    def run():
        net.zero_grad()
        for x, y, x_query, y_query in zip(*batch, strict=True):
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (inner, steps):
                for _ in range(STEPS):
                    steps.step((inner(x) - y).square().mean())
                ((inner(x_query) - y_query).square().mean() / TASKS).backward()
        return [parameter.grad for parameter in net.parameters()]

    return run


def by_torchopt(batch):
    net = network(Normed)
    optimizer = torchopt.MetaSGD(net, lr=RATE)

    def run():
        net.zero_grad()
        start = torchopt.extract_state_dict(net, by="reference")
        optimizer_start = torchopt.extract_state_dict(optimizer, by="reference")
        for x, y, x_query, y_query in zip(*batch, strict=True):
            for _ in range(STEPS):
                optimizer.step((net(x) - y).square().mean())
            ((net(x_query) - y_query).square().mean() / TASKS).backward()
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(optimizer, optimizer_start)
        return [parameter.grad for parameter in net.parameters()]

    return run


def comparisons(*, quick=False):
    batch = tasks()
    peers = {"higher": (higher, by_higher), "TorchOpt": (torchopt, by_torchopt)}
    found = {name: make(batch) for name, (package, make) in peers.items() if package}
    found["funcparam"] = by_vmap(batch)
    expected = list(found["funcparam"]())
    for name in found:
        torch.testing.assert_close(found[name](), expected, rtol=1e-3, atol=1e-4)
    yield Comparison({"tasks": TASKS, "inner steps": STEPS}, found)


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
