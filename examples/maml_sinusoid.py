"""Second-order MAML on sine waves: all tasks in one vmap, with weight norm and with an LSTM.

    python examples/maml_sinusoid.py [--quick] [--out maml.png]

Few-shot regression of Finn et al., Model-Agnostic Meta-Learning, arXiv 1703.03400, section 5.1: a
task is a sine wave with an amplitude in [0.1, 5] and a phase in [0, pi]; a network of two layers of
40 sees 10 points of it, takes 5 steps of gradient descent, and is judged on 10 others. The
meta-gradient goes through the 5 steps, so it needs second derivatives of what makes the weights.
Those of torch.nn.utils.parametrizations.weight_norm are wrong on the CPU: the last table shows how
far its meta-gradient is from finite differences, and what that costs.
"""

import argparse
import math
import time

import matplotlib as mpl
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import WeightNorm

mpl.use("Agg")
import matplotlib.pyplot as plt

TASKS, POINTS, STEPS, RATE = 25, 10, 5, 0.01


def regressor():
    return nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )


class Recurrent(nn.Module):
    """Three steps of one LSTM cell on the same input, and a linear head."""

    def __init__(self, hidden=40):
        super().__init__()
        self.hidden = hidden
        self.cell = nn.LSTMCell(1, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x):
        # the gates by hand: PyTorch's fused cell has no vmap rule
        cell = self.cell
        h = c = x.new_zeros(len(x), self.hidden)
        for _ in range(3):
            gates = x @ cell.weight_ih.mT + cell.bias_ih + h @ cell.weight_hh.mT + cell.bias_hh
            i, f, g, o = gates.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def draw(generator, tasks=TASKS):
    """Support and query points of some sine waves."""
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, 2 * POINTS, 1, generator=generator) - 5
    y = amplitude * torch.sin(x + phase)
    return x[:, :POINTS], y[:, :POINTS], x[:, POINTS:], y[:, POINTS:]


def meta_loss(values, net, steps=STEPS):
    """The query error of each task before and after each inner step, as a function of raw."""

    # --8<-- [start:adapt]
    def error(raw, x, y):
        return (functional_call(net, values(raw), (x,)) - y).square().mean()

    def adapt(raw, x, y, x_query, y_query):
        errors = [error(raw, x_query, y_query)]
        for _ in range(steps):
            step = grad(error)(raw, x, y)
            raw = tree_map(lambda w, g: w - RATE * g, raw, step)
            errors.append(error(raw, x_query, y_query))
        return torch.stack(errors)

    return lambda raw, batch: vmap(adapt, (None, 0, 0, 0, 0))(raw, *batch).mean(0)
    # --8<-- [end:adapt]


def train(loss, raw, iterations, label, seed=0):
    """Adam on the error after the last inner step; the errors of each meta-iteration."""
    raw = tree_map(torch.clone, raw)
    optimizer = torch.optim.Adam(fp.trainable(raw), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    history = []
    start = time.perf_counter()
    for _ in tqdm(range(iterations), desc=label, disable=None):
        optimizer.zero_grad()
        errors = loss(raw, draw(generator))
        errors[-1].backward()
        optimizer.step()
        history.append(errors.detach())
    return raw, torch.stack(history), time.perf_counter() - start


def parametrized(net, rules):
    p = fp.parametrize(net, rules)
    raw, state = p.init(net)
    return meta_loss(lambda raw: p(raw, state), net), raw


def by_torch(net):
    """The same weight norm by PyTorch's module, one task after another."""
    for layer in net[::2]:
        nn.utils.parametrizations.weight_norm(layer)

    def adapt(raw, x, y, x_query, y_query):
        def error(raw, x, y):
            return (functional_call(net, raw, (x,)) - y).square().mean()

        errors = [error(raw, x_query, y_query)]
        for _ in range(STEPS):
            step = torch.autograd.grad(error(raw, x, y), list(raw.values()), create_graph=True)
            raw = {n: w - RATE * g for (n, w), g in zip(raw.items(), step, strict=True)}
            errors.append(error(raw, x_query, y_query))
        return torch.stack(errors)

    def loss(raw, batch):
        return torch.stack([adapt(raw, *task) for task in zip(*batch, strict=True)]).mean(0)

    return loss, {name: p.detach() for name, p in net.named_parameters()}


def meta_gradient_error(loss, raw, seed=0):
    """How far the derivative along a random direction is from finite differences, relative."""
    leaves, spec = tree_flatten(raw)
    generator = torch.Generator().manual_seed(seed)
    leaves = [x.double() + 0.1 * torch.randn(x.shape, generator=generator).double() for x in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    batch = tuple(t.double() for t in draw(torch.Generator().manual_seed(1), tasks=5))

    def last(leaves):
        return loss(tree_unflatten(leaves, spec), batch)[-1]

    exact = torch.autograd.grad(last(leaves), leaves)
    direction = [torch.randn(x.shape, generator=generator).double() for x in leaves]
    slope = sum((g * d).sum() for g, d in zip(exact, direction, strict=True))
    h = 1e-6
    ahead, behind = (
        last(
            [
                (x + s * h * d).detach().requires_grad_()
                for x, d in zip(leaves, direction, strict=True)
            ]
        )
        for s in (1, -1)
    )
    expected = (ahead - behind) / (2 * h)
    return abs((slope - expected) / expected).item()


def plot(histories, path):
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for label, history in histories.items():
        window = max(1, len(history) // 30)
        after = history[:, -1].unfold(0, window, 1).mean(-1)
        axes.plot(range(window, len(history) + 1), after, label=label)
    axes.set(xlabel="meta-iteration", ylabel="squared error after 5 steps", yscale="log")
    marks = 0.1, 0.2, 0.5, 1, 2, 4
    axes.set_yticks(marks, map(str, marks))
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few iterations, for a test")
    parser.add_argument("--out", default="maml.png", help="where the picture goes")
    arguments = parser.parse_args()
    iterations, slow = (40, 2) if arguments.quick else (1000, 40)

    def seeded(make):
        torch.manual_seed(0)
        return make()

    runs = {
        "plain": parametrized(seeded(regressor), {}),
        "weight norm": parametrized(seeded(regressor), {"*.weight": WeightNorm()}),
        "LSTM, weight norm": parametrized(
            seeded(Recurrent), {"cell.weight_*": WeightNorm(), "head.weight": WeightNorm()}
        ),
    }
    histories, rows = {}, []
    for label, (loss, raw) in runs.items():
        raw, histories[label], seconds = train(loss, raw, iterations, label)
        with torch.no_grad():
            errors = loss(raw, draw(torch.Generator().manual_seed(9), tasks=200))
        rows.append((label, errors.tolist(), 1e3 * seconds / iterations))
    print("\nsquared error on 200 new tasks before and after each inner step")
    for label, errors, milliseconds in rows:
        numbers = "  ".join(f"{error:6.3f}" for error in errors)
        print(f"{label:18} {numbers}   {milliseconds:6.1f} ms a meta-iteration")

    ours = parametrized(seeded(regressor), {"*.weight": WeightNorm()})
    theirs = by_torch(seeded(regressor))
    _, _, seconds = train(*theirs, slow, "torch's weight norm")
    print("\nmeta-gradient against finite differences, relative error")
    print(f"funcparam's weight norm  {meta_gradient_error(*ours):.1e}")
    print(
        f"torch's weight norm      {meta_gradient_error(*theirs):.1e}"
        f"   {1e3 * seconds / slow:.1f} ms a meta-iteration, task after task"
    )
    plot(histories, arguments.out)
    print(f"\npicture: {arguments.out}")


if __name__ == "__main__":
    main()
