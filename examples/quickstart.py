"""Handwritten digits that nobody can talk the network out of: what an orthogonal weight buys.

    python examples/quickstart.py [--quick] [--out quickstart.png]

If every weight of a network is orthogonal, and every activation moves two inputs no further apart
than they were, then so does the network: its outputs change at most by as much as its input does.
A lead of m over the second class is then certain to last for every change of the image by less
than m / sqrt(2), whatever the change (Tsuzuku et al., arXiv 1802.04034). Without the constraint the
same argument needs the product of the spectral norms of the weights, and certifies next to nothing.

The same network is trained on the 8 x 8 digits of scikit-learn in three ways, from the same
initial values: as it is, with spectral norm, and with orthogonal weights. Each is trained from
several seeds at once, by one vmap over stacked raw. On images that nobody changed, the constraint
does not help, and training takes longer.
"""

import argparse
import math
import time

import matplotlib as mpl
import optree
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.func import functional_call, vmap
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import Orthogonal, SpectralNorm

mpl.use("Agg")
import matplotlib.pyplot as plt

BATCH, SEEDS, TEMPERATURE = 100, 5, 8.0
RULES = {
    "unconstrained": {},
    "spectral norm": {"*.weight": SpectralNorm()},
    "orthogonal": {"*.weight": Orthogonal()},
}


class MaxMin(nn.Module):
    """Sorts pairs: moves no two inputs apart, and loses nothing (Anil et al., arXiv 1811.05381)."""

    def forward(self, x):
        pairs = x.unflatten(-1, (-1, 2))
        return torch.cat([pairs.amax(-1), pairs.amin(-1)], -1)


def classifier(seed):
    """Three hidden layers, all weights orthogonal to begin with."""
    torch.manual_seed(seed)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(64, 64), MaxMin())]
    net = nn.Sequential(*hidden, nn.Linear(64, 10))
    for layer in net[::2]:
        nn.init.orthogonal_(layer.weight)
    return net


def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    train, test = train_test_split(range(len(y)), test_size=0.25, random_state=0, stratify=y)
    return x[train], y[train], x[test], y[test]


class Members:
    """Networks of several seeds, called and trained at once."""

    def __init__(self, rules):
        nets = [classifier(seed) for seed in range(SEEDS)]
        self.net = nets[0]
        self.p = fp.parametrize(self.net, rules)
        self.raw, self.state = optree.tree_map(
            lambda *members: torch.stack(members), *[self.p.init(net) for net in nets]
        )

    def logits(self, raw, x):
        """The logits of each member for the same images."""

        def one(raw, state):
            return functional_call(self.net, self.p(raw, state), (x,))

        return vmap(one)(raw, self.state)

    def fit(self, x, y, epochs, label):
        """Train raw, in place, by Adam; the power iteration of spectral norm takes its steps."""
        optimizer = torch.optim.Adam(fp.trainable(self.raw), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        torch.manual_seed(0)  # the same batches for all
        for _ in tqdm(range(epochs), desc=label, disable=None):
            for batch in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                logits = TEMPERATURE * self.logits(self.raw, x[batch])
                F.cross_entropy(logits.flatten(0, 1), y[batch].repeat(SEEDS)).backward()
                optimizer.step()
                self.state = vmap(self.p.update)(self.raw, self.state)
            schedule.step()
        self.raw = optree.tree_map(torch.Tensor.detach, self.raw)
        return vmap(self.p)(self.raw, self.state)


def lipschitz(values):
    """How much further apart two outputs can be than their inputs, at most, of each member."""
    weights = [value for name, value in values.items() if name.endswith("weight")]
    return torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights]).prod(0)


def logits_of(net, values, x):
    """The logits of each member, of images for each."""
    return vmap(lambda own, x: functional_call(net, own, (x,)))(values, x)


def certified_radii(net, values, x, y):
    """How far each image can be changed before its class may be lost; negative where it is."""
    logits = logits_of(net, values, x.expand(SEEDS, -1, -1))
    right = F.one_hot(y, 10).bool().expand_as(logits)
    second = logits.masked_fill(right, -math.inf).amax(-1)
    return (logits[right].view_as(second) - second) / (math.sqrt(2) * lipschitz(values)[:, None])


def attacked(net, values, x, y, radius, steps=20):
    """The share that is still right after projected gradient ascent (Madry, arXiv 1706.06083)."""
    change = torch.zeros(SEEDS, *x.shape)
    for _ in range(steps):
        change.requires_grad_()
        logits = logits_of(net, values, x + change)
        loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(SEEDS), reduction="sum")
        (ascent,) = torch.autograd.grad(loss, change)
        change = change.detach() + 2.5 * radius / steps * F.normalize(ascent, dim=-1)
        length = change.norm(dim=-1, keepdim=True)
        change = change * (radius / length.clamp(min=max(radius, 1e-9)))
    return (logits_of(net, values, x + change).argmax(-1) == y).float().mean(-1)


def spread(shares):
    """The mean over the seeds, and the least and the largest."""
    return f"{shares.mean():.2f} ({shares.min():.2f} to {shares.max():.2f})"


def table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def picture(found, radii, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for color, (name, (certified, under_attack)) in zip(
        ("C1", "C2", "C0"), found.items(), strict=True
    ):
        for axes, shares in ((left, certified), (right, under_attack)):
            axes.plot(radii, shares.mean(1), color, label=name)
            axes.fill_between(radii, shares.amin(1), shares.amax(1), color=color, alpha=0.2, lw=0)
    left.set(xlabel="size of the change", ylabel="share of the test images", ylim=(0, 1))
    left.set_title("certain to be right, whatever the change", fontsize=10)
    right.set(xlabel="size of the change")
    right.set_title("right under attack", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, radii[-1])
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    parser.add_argument("--out", default="quickstart.png", help="where the picture goes")
    options = parser.parse_args()
    epochs = 2 if options.quick else 30
    x, y, x_test, y_test = digits()
    radii = torch.linspace(0, 1, 5 if options.quick else 9)

    head = ("network", "right", "certain at 0.25", "certain at 0.5", "right under attack at 0.5")
    rows, found = [(*head, "Lipschitz bound", "seconds")], {}
    for name, rules in RULES.items():
        members = Members(rules)
        if name == "orthogonal":
            print(members.p, end="\n\n")
        start = time.perf_counter()
        values = members.fit(x, y, epochs, name)
        seconds = time.perf_counter() - start
        reach = certified_radii(members.net, values, x_test, y_test)
        certified = torch.stack([(reach > radius).float().mean(-1) for radius in radii])
        under_attack = torch.stack(
            [attacked(members.net, values, x_test, y_test, radius.item()) for radius in radii]
        )
        found[name] = certified, under_attack
        quarter, half = len(radii) // 4, len(radii) // 2
        shares = certified[0], certified[quarter], certified[half], under_attack[half]
        bound = lipschitz(values).amax().item()
        rows.append((name, *map(spread, shares), f"{bound:.2f}", f"{seconds:.0f}"))
    table(rows)
    print(f"shares of {len(y_test)} test images: the mean of {SEEDS} seeds (least to largest);")
    print(
        "changes are measured as lengths, where a pixel is 0 to 1 and an image has length 4 or so"
    )
    picture(found, radii, options.out)

    raw, state = optree.tree_map(lambda stacked: stacked[0], (members.raw, members.state))
    folded = fp.fold(members.net, members.p(raw, state))
    out = functional_call(members.net, members.p(raw, state), (x_test,))
    difference = (folded(x_test) - out).abs().max().item()
    print(f"\nfolded into a plain {type(folded).__name__}: outputs differ by {difference:.1e}")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
