"""A character transformer three ways: plain, with weight norm, and as nGPT on the sphere.

    python examples/ngpt.py [--quick] [--out ngpt.png]

nGPT (Loshchilov et al., arXiv 2410.01131) keeps whatever has the size of an embedding at length 1.
Activations are normalised by the network. Matrices are plain parameters, normalised along the
embedding after each step: these are rules and a line. The three have the same matrices at the
start, and read Python's own documentation, which the interpreter ships as text, in the same order.
"""

import argparse
import math
import time
from collections import OrderedDict

import matplotlib as mpl
import torch
import torch.nn.functional as F
from documentation import CONTEXT, documentation, draw
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import UnitNorm, WeightNorm

mpl.use("Agg")
import matplotlib.pyplot as plt

WIDTH, HEADS, LAYERS, BETAS = 96, 4, 3, (0.9, 0.95)
SMALL = WIDTH**-0.5  # the size of an entry of a vector of length 1

# --8<-- [start:rules]
READ = ("embedding", "*.qkv", "*.up", "head")  # their rows are embeddings
WRITE = ("*.out", "*.down")  # their columns are
SPHERE = {f"{name}.weight": UnitNorm(dim=1) for name in READ}
SPHERE |= {f"{name}.weight": UnitNorm(dim=0) for name in WRITE}
NORMALISED = {f"{name}.weight": WeightNorm() for name in READ + WRITE}
# --8<-- [end:rules]


class Attention(nn.Module):
    """Causal, with rotary positions. What `rescale` does to queries and keys is up to the way."""

    def __init__(self, rescale):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.rescale = rescale
        rates = 1e4 ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angles = torch.arange(CONTEXT)[:, None] * rates
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turned(self, x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns).flatten(-2)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (self.rescale(self.turned(part)) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, rescale):
        super().__init__()
        self.up = nn.Linear(WIDTH, 8 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.rescale = rescale

    def forward(self, x):
        u, v = self.rescale(self.up(x)).chunk(2, -1)
        return self.down(u * F.silu(v))


class Added(nn.Module):
    """The plain residual: x + part(norm(x))."""

    def __init__(self, part):
        super().__init__()
        self.norm, self.part = nn.RMSNorm(WIDTH), part

    def forward(self, x):
        return x + self.part(self.norm(x))


def network(symbols, blocks, **last):
    """Layers in their order, with matrices that depend on the seed alone."""
    net = nn.Sequential(OrderedDict(embedding=nn.Embedding(symbols, WIDTH), blocks=blocks, **last))
    torch.manual_seed(0)
    for name, weight in net.named_parameters():
        if weight.ndim == 2:
            written = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(weight, std=SMALL / math.sqrt(2 * LAYERS) if written else SMALL)
    return net


def residual(symbols):
    parts = [make(nn.Identity()) for _ in range(LAYERS) for make in (Attention, MLP)]
    head = nn.Linear(WIDTH, symbols, bias=False)
    return network(symbols, nn.Sequential(*map(Added, parts)), norm=nn.RMSNorm(WIDTH), head=head)


# --8<-- [start:sphere]
class Unit(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


class Scale(nn.Module):
    """A learned factor for each entry. How small it is kept is how fast an optimizer moves it."""

    def __init__(self, *shape, start, kept=SMALL):
        super().__init__()
        self.value, self.factor = nn.Parameter(torch.full(shape, kept)), start / kept

    def forward(self, x):
        return self.factor * self.value * x


class Towards(nn.Module):
    """A step along the sphere, towards what `part` says, with a learned rate for each entry."""

    def __init__(self, part):
        super().__init__()
        self.part, self.rate, self.unit = part, Scale(WIDTH, start=1 / LAYERS), Unit()

    def forward(self, x):
        return self.unit(x + self.rate(self.unit(self.part(x)) - x))


def on_the_sphere(symbols):
    parts, size = [], WIDTH // HEADS
    for _ in range(LAYERS):
        cosines = nn.Sequential(Unit(), Scale(HEADS, 1, size, start=size**0.5))
        parts += Attention(cosines), MLP(Scale(8 * WIDTH, start=WIDTH**0.5, kept=1.0))
    head = nn.Linear(WIDTH, symbols, bias=False)
    scale = Scale(symbols, start=10.0, kept=1.0)  # of cosines, for logits
    return network(symbols, nn.Sequential(*map(Towards, parts)), head=head, scale=scale)


# --8<-- [end:sphere]


# --8<-- [start:ways]
def coordinates(symbols, rules, rate):
    """Plain where there is no rule."""
    net = residual(symbols)
    model = fp.Parametrized(net, fp.parametrize(net, rules))
    return model, AdamW(model.parameters(), rate, BETAS, weight_decay=0.1)


def projected(symbols, rules, rate):
    net = on_the_sphere(symbols)
    p = fp.parametrize(net, rules)
    net = fp.fold(net, p.project(net))
    optimizer = AdamW(net.parameters(), rate, BETAS, weight_decay=0)
    fp.project_after(optimizer, p, net)
    return net, optimizer


# The rate of each is the best of some. The last number is the share of steps that warm up.
WAYS = {
    "plain": (coordinates, {}, 0.006, 0.1),
    "weight norm": (coordinates, NORMALISED, 0.006, 0.1),
    "nGPT": (projected, SPHERE, 0.01, 0.0),
}
# --8<-- [end:ways]


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def lengths(model):
    """The shortest and the longest of the vectors that nGPT normalises."""
    net = model.fold() if isinstance(model, fp.Parametrized) else model
    rules = fp.parametrize(net, SPHERE)
    found = [net.get_parameter(name).norm(dim=rule.dim) for name, rule in rules.items()]
    return [length.item() for length in torch.cat(found).detach().aminmax()]


def train(model, optimizer, warm_up, steps, tokens, held_out, label):
    """Held-out loss by step, and the seconds of processor time that steps took."""

    def factor(i):
        return min(1, (i + 1) / (warm_up * steps + 1)) * (1 + math.cos(math.pi * i / steps)) / 2

    schedule, generator = LambdaLR(optimizer, factor), torch.Generator().manual_seed(1)
    curve, seconds = {}, 0.0
    for i in tqdm(range(1, steps + 1), label, disable=None):
        started = time.process_time()
        optimizer.zero_grad()
        cross_entropy(model, *draw(tokens, generator)).backward()
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - started
        if i % max(1, steps // 20) == 0:
            with torch.no_grad():
                curve[i] = cross_entropy(model, *held_out).item()
    return curve, seconds


def show(runs):
    """A row for each; its steps are those to the loss that all of them reach."""
    goal = max(min(curve.values()) for curve, *_ in runs.values())
    print(f"\n             steps to {goal:.2f}  held-out loss  seconds", end="")
    print("  lengths before     and after  furthest from 1")
    for label, (curve, seconds, before, after) in runs.items():
        steps = next(i for i, loss in curve.items() if loss <= goal)
        spans = "  ".join(f"{low:.2f} to {high:.2f}" for low, high in (before, after))
        furthest = max(abs(length - 1) for length in after)
        loss = list(curve.values())[-1]
        print(f"{label:11} {steps:14} {loss:14.3f} {seconds:8.1f}    {spans} {furthest:16.0e}")


def plot(runs, path):
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for label, (curve, *_) in runs.items():
        ax.plot(*zip(*curve.items(), strict=True), ".-", label=label)
    ax.set(xlabel="step", ylabel="held-out loss, nats a character")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, for a test")
    parser.add_argument("--out", default="ngpt.png", help="where the picture goes")
    options = parser.parse_args()
    steps, count = (16, 16) if options.quick else (400, 128)

    torch.set_num_threads(1)  # matrices are small
    tokens, rest, symbols = documentation()
    held_out = draw(rest, torch.Generator().manual_seed(9), count)
    runs = {}
    for label, (make, rules, rate, warm_up) in WAYS.items():
        model, optimizer = make(symbols, rules, rate)
        before = lengths(model)
        run = train(model, optimizer, warm_up, steps, tokens, held_out, label)
        runs[label] = *run, before, lengths(model)
    show(runs)
    plot(runs, options.out)
    print(f"\npicture: {options.out}")


if __name__ == "__main__":
    main()
