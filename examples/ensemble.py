"""64 networks in one vmap: an ensemble through raw, sweeps of a bound and of a rank through state.

    python examples/ensemble.py [--quick] [--out ensemble.png]

p(raw, state) is a function of tensors, so a stack of raws and states is a stack of networks, and
one vmap trains it. Three stacks of 64, on 150 of the handwritten digits of scikit-learn:

* an ensemble, whose members differ in raw, and how well it knows what it does not know: the
  calibration error of Guo et al., arXiv 1706.04599, of single members and of their average
  (Lakshminarayanan et al., arXiv 1612.01474), on clean digits and on digits with noise;
* networks whose weights have to stay within a bound, eight bounds at once: bounds are in state;
* a network adapted to digits turned by 90 degrees by LoRA, eight ranks at once: each rank of an
  adapter has a scale in state, and scale 0 switches it off.
"""

import argparse
import time

import matplotlib as mpl
import optree
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import Frozen, Interval, LoRA, WeightNorm

mpl.use("Agg")
import matplotlib.pyplot as plt

MEMBERS, SEEDS, LABELLED, BATCH, BINS, NOISE = 64, 8, 150, 50, 10, 0.3
BOUNDS = 0.2, 0.3, 0.5, 0.8, 1.3, 2.0, 3.0, 5.0
RANKS = 0, 1, 2, 3, 4, 5, 6, 8


def network():
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def digits(turned=False):
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    if turned:
        x = x.view(-1, 8, 8).rot90(dims=(1, 2)).flatten(1)
    train, test = train_test_split(range(len(y)), train_size=LABELLED, random_state=0, stratify=y)
    return x[train], y[train], x[test], y[test]


# --8<-- [start:loss]
def member_loss(p, net):
    """The loss of one network, as a function of its raw and state."""
    return lambda raw, state, x, y: F.cross_entropy(functional_call(net, p(raw, state), (x,)), y)


# --8<-- [end:loss]


# --8<-- [start:train]
def train(p, net, raws, states, data, epochs, label):
    """Train a stack in place by Adam, each network on batches of its own."""
    x, y = data
    losses = vmap(member_loss(p, net))
    optimizer = torch.optim.Adam(fp.trainable(raws), lr=1e-2)
    for _ in tqdm(range(epochs), desc=label, disable=None):
        for batch in torch.rand(MEMBERS, len(x)).argsort(-1).split(BATCH, dim=1):
            optimizer.zero_grad()
            losses(raws, states, x[batch], y[batch]).sum().backward()
            optimizer.step()


# --8<-- [end:train]


@torch.no_grad()
def predict(p, net, raws, states, x):
    """Probabilities, of shape (members, points, classes)."""
    outputs = vmap(lambda raw, state: functional_call(net, p(raw, state), (x,)))(raws, states)
    return outputs.softmax(-1)


# --8<-- [start:calibration]
def reliability(probabilities, y):
    """Of each bin of confidence: its share of the points, mean confidence, accuracy."""
    confidence, chosen = probabilities.max(-1)
    right = (chosen == y).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    member = F.one_hot(bins, BINS).float()
    count = member.sum(0)
    return count / len(y), confidence @ member / count, right @ member / count


def calibration_error(probabilities, y):
    share, confidence, accuracy = reliability(probabilities, y)
    return (share * (confidence - accuracy).abs()).nansum().item()  # an empty bin is 0 / 0


# --8<-- [end:calibration]


def measures(probabilities, y):
    """Accuracy, mean confidence, negative log-likelihood, calibration error."""
    confidence, chosen = probabilities.max(-1)
    return torch.tensor(
        [
            (chosen == y).float().mean(),
            confidence.mean(),
            F.nll_loss(probabilities.log(), y),
            calibration_error(probabilities, y),
        ]
    )


def beside_a_loop(p, net, raws, states, data, rounds):
    """One gradient of each network by vmap and in a loop: seconds, in turns, and difference."""
    x, y = data[0][:BATCH], data[1][:BATCH]
    one = grad(member_loss(p, net))

    def by_vmap():
        return vmap(one, in_dims=(0, 0, None, None))(raws, states, x, y)

    def in_a_loop():
        pick = [optree.tree_map(lambda t, i=i: t[i], (raws, states)) for i in range(MEMBERS)]
        gradients = [one(raw, state, x, y) for raw, state in pick]
        return optree.tree_map(lambda *ts: torch.stack(ts), *gradients)

    seconds = [[], []]
    for _ in range(rounds):
        for ways, run in zip(seconds, (by_vmap, in_a_loop), strict=True):
            start = time.perf_counter()
            run()
            ways.append(time.perf_counter() - start)
    gaps = optree.tree_map(lambda a, b: (a - b).abs().max(), by_vmap(), in_a_loop())
    return min(seconds[0]), min(seconds[1]), max(optree.tree_leaves(gaps)).item()


def ensemble(data, epochs, rounds):
    """What all members say of the noisy digits, and the network that goes on to LoRA."""
    x, y, x_test, y_test = data
    # --8<-- [start:ensemble]
    nets = [network() for _ in range(MEMBERS)]
    p = fp.parametrize(nets[0], {"*.weight": WeightNorm()})
    raws, states = optree.tree_map(lambda *ts: torch.stack(ts), *[p.init(net) for net in nets])
    # --8<-- [end:ensemble]
    train(p, nets[0], raws, states, (x, y), epochs, "ensemble")
    raws = optree.tree_map(torch.Tensor.detach, raws)
    noisy = x_test + NOISE * torch.randn(x_test.shape)

    print(f"ensemble of {MEMBERS}, {LABELLED} digits to train on, {len(y_test)} to test")
    print("                          accuracy  confidence  log-loss  calibration error")
    layout = "{:6}  {:16}  {:8.3f}  {:10.3f}  {:8.3f}  {:17.3f}"
    for kind, points in {"clean": x_test, "noisy": noisy}.items():
        members = predict(p, nets[0], raws, states, points)
        singles = torch.stack([measures(member, y_test) for member in members])
        print(layout.format(kind, "members, mean", *singles.mean(0)))
        print(layout.format(kind, "members, lowest", *singles.amin(0)))
        print(layout.format(kind, "members, highest", *singles.amax(0)))
        print(layout.format(kind, "their average", *measures(members.mean(0), y_test)))
    fast, slow, gap = beside_a_loop(p, nets[0], raws, states, data, rounds)
    print(
        f"gradients of all {MEMBERS}: one vmap {1e3 * fast:.1f} ms, a loop {1e3 * slow:.1f} ms;"
        f" they differ by {gap:.0e}\n"
    )
    raw, state = optree.tree_map(lambda t: t[0], (raws, states))
    return members, fp.fold(nets[0], p(raw, state))


def sweep_bounds(data, epochs):
    """Accuracy, confidence and calibration error for each bound, means over networks."""
    x, y, x_test, y_test = data
    nets = [network() for _ in range(SEEDS)]

    # --8<-- [start:bounds]
    def within(bound):
        return fp.parametrize(nets[0], {"*.weight": Interval(-bound, bound)})

    # Each network starts from its own values, with its own bound in state; then one p serves all.
    pairs = [within(bound).init(net) for bound in BOUNDS for net in nets]
    raws, states = optree.tree_map(lambda *ts: torch.stack(ts), *pairs)
    p = within(1.0)
    # --8<-- [end:bounds]
    train(p, nets[0], raws, states, (x, y), epochs, "bounds")
    probabilities = predict(p, nets[0], raws, states, x_test)
    with torch.no_grad():
        values = vmap(p)(raws, states)
    largest = torch.stack([values[name].flatten(1).abs().amax(1) for name in p]).amax(0)

    print(f"weights within a bound: means of {SEEDS} networks for each")
    print("bound  largest weight  accuracy  confidence  calibration error")
    rows = []
    for i, bound in enumerate(BOUNDS):
        own = slice(SEEDS * i, SEEDS * (i + 1))
        means = torch.stack([measures(member, y_test) for member in probabilities[own]]).mean(0)
        accuracy, confidence, _, error = means
        print(
            f"{bound:5.1f}  {largest[own].max():14.3f}  {accuracy:8.3f}  {confidence:10.3f}"
            f"  {error:17.3f}"
        )
        rows.append((accuracy, confidence, error))
    print()
    return torch.tensor(rows)


def sweep_ranks(base, data, epochs):
    """Accuracies, (ranks, seeds): one frozen network, adapted by every rank from every seed."""
    x, y, x_test, y_test = data
    # --8<-- [start:ranks]
    top = max(RANKS)
    p = fp.parametrize(base, {"*.weight": LoRA(rank=top), "*": Frozen()})

    def limited(state, rank):
        """Only the first ranks of every adapter count: the others have scale 0."""
        scale = (torch.arange(top) < rank).float()
        return state | {name: state[name] | {"scale": scale} for name in adapted}

    adapted = [name for name in p if isinstance(p[name], LoRA)]
    inits = [p.init(base) for _ in range(SEEDS)]
    pairs = [(raw, limited(state, rank)) for rank in RANKS for raw, state in inits]
    raws, states = optree.tree_map(lambda *ts: torch.stack(ts), *pairs)
    # --8<-- [end:ranks]
    train(p, base, raws, states, (x, y), epochs, "ranks")
    probabilities = predict(p, base, raws, states, x_test)
    with torch.no_grad():
        values = vmap(p)(raws, states)

    print(f"LoRA on digits turned by 90 degrees: {SEEDS} networks for each rank")
    print("rank  trained numbers  accuracy  lowest  highest  singular values beyond the rank")
    accuracies = (probabilities.argmax(-1) == y_test).float().mean(1).view(len(RANKS), SEEDS)
    for i, (rank, row) in enumerate(zip(RANKS, accuracies, strict=True)):
        own = slice(SEEDS * i, SEEDS * (i + 1))
        changes = [values[name][own] - states[name]["base"][own] for name in adapted]
        beyond = max(torch.linalg.svdvals(change)[:, rank:].max() for change in changes)
        count = sum(rank * sum(change.shape[1:]) for change in changes)
        print(
            f"{rank:4}  {count:15}  {row.mean():8.3f}  {row.min():6.3f}  {row.max():7.3f}"
            f"  {beyond:31.0e}"
        )
    return accuracies


def picture(members, y, bounds, ranks, path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1)

    def curve(probabilities):
        share, confidence, accuracy = reliability(probabilities, y)
        return torch.stack([confidence, accuracy])[:, share * len(y) >= 10]  # fewer say little

    for i, member in enumerate(members[:SEEDS]):
        label = f"{SEEDS} single members" if i == 0 else None
        left.plot(*curve(member), "C1.-", alpha=0.4, linewidth=1, label=label)
    left.plot(*curve(members.mean(0)), "C0o-", markersize=4, label=f"average of {len(members)}")
    left.set(xlabel="confidence", ylabel="accuracy", xlim=(0.15, 1.01), ylim=(0, 1.02))
    left.set_title("digits with noise: the diagonal is honest", fontsize=10)
    middle.plot(BOUNDS, bounds[:, 0], "C0o-", markersize=4, label="accuracy")
    middle.plot(BOUNDS, bounds[:, 1], "C3s--", markersize=4, label="confidence")
    middle.plot(BOUNDS, bounds[:, 2], "C2^:", markersize=4, label="calibration error")
    middle.set(xlabel="bound of the weights", xscale="log", ylim=(0, 1.02))
    middle.set_xticks(BOUNDS, [f"{bound:g}" for bound in BOUNDS])
    middle.minorticks_off()
    middle.set_title("8 bounds, mean of 8 networks each", fontsize=10)
    right.plot(RANKS, ranks.mean(1), "C0o-", markersize=4, label="mean of 8 networks")
    spread = ranks.amin(1), ranks.amax(1)
    right.fill_between(RANKS, *spread, alpha=0.2, linewidth=0, label="lowest to highest")
    right.set(xlabel="rank of the adapters", ylabel="accuracy", ylim=(0, 1.02))
    right.set_title("8 ranks of LoRA, digits turned by 90°", fontsize=10)
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    parser.add_argument("--out", default="ensemble.png", help="where the picture goes")
    options = parser.parse_args()
    epochs, rounds = (30, 1) if options.quick else (120, 7)

    torch.manual_seed(0)
    data = digits()
    members, base = ensemble(data, epochs, rounds)
    bounds = sweep_bounds(data, epochs)
    ranks = sweep_ranks(base, digits(turned=True), epochs)
    picture(members, data[3], bounds, ranks, options.out)
    print(f"\npicture: {options.out}")


if __name__ == "__main__":
    main()
