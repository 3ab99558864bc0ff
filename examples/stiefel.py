"""Orthonormal frames four ways: trivialized, rebased, projected, and by a manifold optimizer.

    python examples/stiefel.py [--quick] [--out stiefel.png]

Two problems on the data of scikit-learn, over matrices with orthonormal columns. The first is a
subspace of handwritten digits, a fifth of which is noise: the sum of distances, not of their
squares, which noise pulls less. The second is independent components of patches of photographs:
an orthogonal matrix whose outputs are as sparse as can be. Each is minimized from the same start by

* trivialization: raw is trained, and a map from one base point makes the frame of it;
* rebase: the same, with the base point moved after each step, which is Riemannian optimization;
* projection: the frame itself is trained, along its tangent space, and projected after each step;
* geoopt's Riemannian optimizers, where geoopt is installed;
* no constraint at all.

SGD with momentum and Adam for each, Muon where it applies; the learning rate of each is the best
of some.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import nn
from torch.optim import SGD, Adam, Muon
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import Stiefel

try:
    import geoopt
except ImportError:
    geoopt = None

mpl.use("Agg")
import matplotlib.pyplot as plt


class Problem(NamedTuple):
    """What a frame should minimize, and what else is asked of it."""

    cost: Callable
    start: torch.Tensor
    score: Callable
    meaning: str


def frame(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns)).Q


def subspace(noise=240, clean=960, size=10):
    """The ten dimensions to which digits and noise are closest, and the digits it explains."""
    digits = torch.tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797)] / 16
    data = torch.cat([digits[:clean], 2 * torch.rand(noise, 64)])
    middle = data.median(0).values
    data, held_out = data - middle, digits[clean:] - middle

    # --8<-- [start:subspace]
    def cost(W):
        return (data - data @ W @ W.mT).norm(dim=1).mean()

    # --8<-- [end:subspace]

    def explained(W):
        rest = held_out - held_out @ W @ W.mT
        return 1 - (rest.square().sum() / held_out.square().sum()).item()

    return Problem(cost, frame(64, size), explained, "held-out digits explained"), data


def components(patches=3000, size=32):
    """Directions of whitened 8 x 8 patches in which these are sparse, by log cosh."""
    photos = [torch.tensor(photo).float().mean(-1) for photo in load_sample_images().images]
    tiles = torch.cat([photo.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 64) for photo in photos])
    tiles = tiles[torch.randperm(len(tiles))[:patches]]
    tiles = tiles - tiles.mean(1, keepdim=True)
    U, S, Vh = torch.linalg.svd(tiles - tiles.mean(0), full_matrices=False)
    white = U[:, :size] * len(tiles) ** 0.5

    # --8<-- [start:components]
    def cost(W):
        return (white @ W).cosh().log().mean()

    # --8<-- [end:components]

    def kurtosis(W):
        return (white @ W).pow(4).mean().item() - 3

    filters = (S[:size, None] * Vh[:size]).mT
    return Problem(cost, frame(size, size), kurtosis, "mean kurtosis"), filters


# A way returns the frame as it is now, the tensors for an optimizer, and what follows each step.


# --8<-- [start:ways]
def unconstrained(start, make):
    W = start.clone().requires_grad_()
    optimizer = make([W])
    return lambda: W, optimizer, optimizer.step


def trivialized(start, make):
    p = fp.parametrize({"W": start}, {"W": Stiefel()})
    raw, state = p.init({"W": start})
    optimizer = make(fp.trainable(raw))
    return lambda: p(raw, state)["W"], optimizer, optimizer.step


def rebased(start, make):
    p = fp.parametrize({"W": start}, {"W": Stiefel()})
    raw, state = p.init({"W": start})
    optimizer = make(fp.trainable(raw))

    def step():
        nonlocal raw, state
        optimizer.step()
        raw, state = fp.move(p, p, raw, state, optimizer)

    return lambda: p(raw, state)["W"], optimizer, step


def projected(start, make):
    net = nn.ParameterDict({"W": start.clone()})
    p = fp.parametrize(net, {"W": Stiefel()})
    optimizer = make(net.parameters())
    fp.tangent_before(optimizer, p, net)
    fp.project_after(optimizer, p, net)
    return lambda: net["W"], optimizer, optimizer.step


def by_geoopt(start, make):
    W = geoopt.ManifoldParameter(start.clone(), manifold=geoopt.EuclideanStiefel())
    optimizer = make([W])
    return lambda: W, optimizer, optimizer.step


# --8<-- [end:ways]


def contestants():
    """Each way with an optimizer, and the rates to choose from."""
    sgd, rates = partial(SGD, momentum=0.9), {"SGD": (0.3, 1, 10, 30), "Adam": (0.01, 0.03, 0.1)}
    yield "unconstrained", "Adam", unconstrained, Adam, rates["Adam"]
    for label, way in (
        ("trivialized", trivialized),
        ("rebased", rebased),
        ("projected", projected),
    ):
        yield label, "SGD", way, sgd, rates["SGD"]
        yield label, "Adam", way, Adam, rates["Adam"]
    yield "projected", "Muon", projected, partial(Muon, weight_decay=0), (0.01, 0.03, 0.1)
    if geoopt is not None:
        riemannian = partial(geoopt.optim.RiemannianSGD, momentum=0.9)
        yield "geoopt", "SGD", by_geoopt, riemannian, rates["SGD"]
        # its Adam has one second moment for each matrix, and wants other rates
        yield "geoopt", "Adam", by_geoopt, geoopt.optim.RiemannianAdam, (0.1, 0.3, 1.0)


class Run(NamedTuple):
    """What became of a frame."""

    costs: list
    W: torch.Tensor
    milliseconds: float
    rate: float


def minimize(problem, way, make, rate, steps):
    frame_now, optimizer, step = way(problem.start, partial(make, lr=rate))
    costs, started = [], time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        cost = problem.cost(frame_now())
        cost.backward()
        step()
        costs.append(cost.item())
    milliseconds = 1e3 * (time.process_time() - started) / steps
    return Run(costs, frame_now().detach(), milliseconds, rate)


def contest(problem, steps, quick, label):
    """The best run of each contestant: the lowest cost at the end."""
    found = {}
    for way_label, optimizer, way, make, rates in tqdm([*contestants()], label, disable=None):
        runs = [minimize(problem, way, make, r, steps) for r in (rates[1:2] if quick else rates)]
        finite = [run for run in runs if run.costs[-1] == run.costs[-1]]
        found[way_label, optimizer] = min(finite, key=lambda run: run.costs[-1])
    return found


def show(title, problem, found):
    """A row for each; its steps are those to 95 per cent of the way from the start to the best."""
    start = problem.cost(problem.start).item()
    best = min(run.costs[-1] for (way, _), run in found.items() if way != "unconstrained")
    print(f"{title}: cost {start:.4f} at the start")
    print(
        f"way            optimizer    cost  |W'W - I|  {problem.meaning}  steps  ms a step   rate"
    )
    for (way, optimizer), run in found.items():
        gram = run.W.mT @ run.W
        violation = (gram - torch.eye(len(gram))).abs().max()
        near = start - 0.95 * (start - best)
        steps = next((str(i) for i, cost in enumerate(run.costs) if cost <= near), "never")
        print(
            f"{way:14} {optimizer:9} {run.costs[-1]:7.4f} {violation:10.0e}"
            f" {problem.score(run.W):{len(problem.meaning) + 1}.3f} {steps:>6}"
            f" {run.milliseconds:10.2f} {run.rate:6g}"
        )


def tiles(filters):
    """Filters of 8 x 8 in rows, each by its own scale."""
    rows = []
    for row in (filters / filters.abs().amax(0)).mT.reshape(4, 8, 8, 8):
        rows.append(nn.functional.pad(row, (0, 1, 0, 1), value=1).transpose(0, 1).flatten(1))
    return torch.cat(rows)


def plot(contests, before, after, path):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    colours = {"trivialized": "C0", "rebased": "C1", "projected": "C2", "geoopt": "C3"}
    styles = {"SGD": "--", "Adam": "-", "Muon": ":"}
    for ax, (title, found) in zip(axes, contests.items(), strict=False):
        for (way, optimizer), run in found.items():
            if way in colours:
                style = {"color": colours[way], "ls": styles[optimizer], "lw": 1.2}
                ax.plot(run.costs, label=f"{way}, {optimizer}", **style)
        low = min(min(run.costs) for (way, _), run in found.items() if way in colours)
        high = max(
            run.costs[len(run.costs) // 5] for (way, _), run in found.items() if way in colours
        )
        ax.set(title=title, xlabel="step", ylim=(low - 0.05 * (high - low), high))
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    for ax, title, filters in zip(axes[2:], ("start", "components"), (before, after), strict=True):
        ax.imshow(tiles(filters), cmap="gray", vmin=-1, vmax=1)
        ax.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, for a test")
    parser.add_argument("--out", default="stiefel.png", help="where the picture goes")
    options = parser.parse_args()
    steps = 20 if options.quick else 150

    torch.set_num_threads(1)  # matrices are small
    torch.manual_seed(0)
    digits, data = subspace()
    photos, filters = components(1000 if options.quick else 3000)
    contests = {
        "subspace": contest(digits, steps, options.quick, "subspace"),
        "components": contest(photos, steps, options.quick, "components"),
    }
    print()
    show("a subspace of digits and noise", digits, contests["subspace"])
    pca = torch.linalg.svd(data - data.mean(0), full_matrices=False).Vh[:10].mT
    print(f"PCA has cost {digits.cost(pca):.4f} and explains {digits.score(pca):.3f}\n")
    show("components of patches", photos, contests["components"])
    if geoopt is None:
        print("geoopt is not installed: pip install geoopt, and it takes part")
    best = contests["components"]["rebased", "Adam"].W
    plot(contests, filters @ photos.start, filters @ best, options.out)
    print(f"\npicture: {options.out}")


if __name__ == "__main__":
    main()
