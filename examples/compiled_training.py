"""A transformer with constrained weights: the whole training step in one compiled graph.

    python examples/compiled_training.py [--quick] [--out compiled_training.png]

A small language model reads Python's own documentation, which the interpreter ships as text. In
each block the weight behind attention is orthogonal, the first of the MLP has spectral norm 1, and
two more are normalised. torch.nn.utils.parametrizations has the same three maps, so both train side
by side, eager and compiled, from the same raw values, on the same batches. funcparam's step is one
function of tensors (power iteration, values, forward, backward and Adam) and becomes one graph;
PyTorch's module needs two, the loss and the optimizer, with autograd between them.
"""

import argparse
import copy
import logging
import math
import statistics
import time

import matplotlib as mpl
import torch
import torch.nn.functional as F
from documentation import CONTEXT, documentation, draw
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.func import functional_call, grad_and_value
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map
from tqdm import tqdm

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm

mpl.use("Agg")
import matplotlib.pyplot as plt

WIDTH, HEADS = 64, 4
RATE, BETAS, EPS = 1e-2, (0.9, 0.99), 1e-8
EQUAL, COMPILING = 10, 2  # first steps: whose losses are compared, in which graphs are compiled

# --8<-- [start:rules]
RULES = {
    "*.qkv.weight": WeightNorm(),
    "*.out.weight": Orthogonal("cayley"),
    "*.up.weight": SpectralNorm(),
    "*.down.weight": WeightNorm(),
}
# --8<-- [end:rules]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        nn.init.orthogonal_(self.out.weight)

    def forward(self, x):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self, symbols, layers):
        super().__init__()
        self.embedding = nn.Embedding(symbols, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, symbols)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy(logits, y):
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


# --8<-- [start:adam]
def adam(raw, gradient, moments):
    """One step of Adam as a function, over trees."""
    count, first, second = moments
    count = count + 1
    first = tree_map(lambda m, g: torch.lerp(g, m, BETAS[0]), first, gradient)
    second = tree_map(lambda v, g: torch.lerp(g * g, v, BETAS[1]), second, gradient)
    m_scale, v_scale = (1 - beta**count for beta in BETAS)
    raw = tree_map(
        lambda r, m, v: r - RATE * (m / m_scale) / ((v / v_scale).sqrt() + EPS), raw, first, second
    )
    return raw, (count, first, second)


# --8<-- [end:adam]


# --8<-- [start:step]
def training_step(net, p):
    """The whole step, from tensors to tensors."""

    def loss(raw, state, x, y):
        return cross_entropy(functional_call(net, p(raw, state), (x,)), y)

    def step(raw, state, moments, x, y):
        state = p.update(raw, state)
        gradient, value = grad_and_value(loss)(raw, state, x, y)
        raw, moments = adam(raw, gradient, moments)
        return raw, state, moments, value

    return step


# --8<-- [end:step]


def by_torch(net):
    """The same parametrization by PyTorch's module."""
    for block in net.blocks:
        parametrizations.weight_norm(block.qkv)
        parametrizations.orthogonal(block.out, orthogonal_map="cayley")
        parametrizations.spectral_norm(block.up)
        parametrizations.weight_norm(block.down)
    return net


class Counting:
    """A compiler's backend that counts the graphs which it gets."""

    def __init__(self, backend):
        self.graphs, self.backend = 0, lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


class Functional:
    """funcparam's step with its tensors; `backend` None is eager."""

    def __init__(self, net, p, raw, state, backend=None):
        first, second = (tree_map(torch.zeros_like, raw) for _ in range(2))
        self.tensors = raw, state, (torch.zeros(()), first, second)
        self.step = training_step(net, p)
        self.counter = Counting(backend) if backend else None
        if backend:
            # --8<-- [start:compile]
            self.step = torch.compile(self.step, fullgraph=True, backend=self.counter)
            # --8<-- [end:compile]

    def __call__(self, x, y):
        *self.tensors, loss = self.step(*self.tensors, x, y)
        return loss


class Stateful:
    """PyTorch's module and optimizer; `backend` None is eager."""

    def __init__(self, net, backend=None):
        self.optimizer = torch.optim.Adam(net.parameters(), lr=RATE, betas=BETAS, eps=EPS)
        self.loss = lambda x, y: cross_entropy(net(x), y)
        self.update = self.optimizer.step
        self.counter = Counting(backend) if backend else None
        if backend:
            self.loss = torch.compile(self.loss, fullgraph=True, backend=self.counter)
            self.update = torch.compile(self.update, backend=self.counter)

    def __call__(self, x, y):
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        self.update()
        return loss.detach()


def side_by_side(ways, tokens, steps):
    """Every way takes each step on the same batch, in turns: losses, seconds, graph breaks."""
    generator = torch.Generator().manual_seed(0)
    losses, seconds = ({name: [] for name in ways} for _ in range(2))
    breaks = dict.fromkeys(ways, 0)
    for _ in tqdm(range(steps), desc="side by side", disable=None):
        x, y = draw(tokens, generator)
        for name, step in ways.items():
            counters["graph_break"].clear()  # dynamo's own count
            start = time.perf_counter()
            losses[name].append(step(x, y).item())
            seconds[name].append(time.perf_counter() - start)
            breaks[name] += sum(counters["graph_break"].values())
    return losses, seconds, breaks


def report(ways, losses, seconds, breaks):
    print(
        f"way                  first loss   loss {EQUAL}  graphs  breaks  compiling"
        "  ms a step, quartiles"
    )
    for name, step in ways.items():
        low, middle, high = statistics.quantiles([1e3 * s for s in seconds[name][COMPILING:]], n=4)
        compiling = [""] * 3
        if step.counter:
            wait = sum(seconds[name][:COMPILING])
            compiling = [step.counter.graphs, breaks[name], f"{wait:.0f} s"]
        print(
            f"{name:19}  {losses[name][0]:10.5f}  {losses[name][EQUAL - 1]:8.5f}"
            + "  {:>6}  {:>6}  {:>9}".format(*compiling)
            + f"  {middle:9.1f} ({low:.1f} to {high:.1f})"
        )
    table = torch.tensor([losses[name][:EQUAL] for name in ways]).double()
    gap = (table.amax(0) - table.amin(0)).max()
    print(f"losses of the first {EQUAL} steps differ by at most {gap:.0e}")


@torch.no_grad()
def bits(net, params, tokens):
    """Bits a character on text that was not trained on."""
    x, y = draw(tokens, torch.Generator().manual_seed(1), count=256)
    return cross_entropy(functional_call(net, params, (x,)), y).item() / math.log(2)


def picture(seconds, history, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    left.plot(range(1, len(history) + 1), history, "C0", linewidth=1)
    left.set(xlabel="step", ylabel="training loss, nats a character", ylim=(0, None))
    left.set_title("compiled training on Python's documentation", fontsize=10)
    milliseconds = [[1e3 * s for s in times[COMPILING:]] for times in seconds.values()]
    right.boxplot(milliseconds, orientation="horizontal", showfliers=False, widths=0.6)
    right.set_yticks(range(1, len(seconds) + 1), seconds)
    right.invert_yaxis()
    right.set(xlabel="ms a step", xlim=(0, None))
    right.set_title("the same step, in turns", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="traced, not compiled to machine code")
    parser.add_argument("--out", default="compiled_training.png", help="where the picture goes")
    options = parser.parse_args()
    layers, backend, steps, more = 2, "inductor", 100, 700
    if options.quick:
        layers, backend, steps, more = 1, "aot_eager", 12, 30
    torch._logging.set_logs(dynamo=logging.ERROR)  # it warns that it does not record a profile

    train, test, symbols = documentation()
    torch.manual_seed(0)
    net = Transformer(symbols, layers)
    p = fp.parametrize(net, RULES)
    print(p, end="\n\n")
    # --8<-- [start:same]
    theirs = by_torch(copy.deepcopy(net))
    raw, state, _ = checkpoint.read(theirs.state_dict(), p)  # raw and state, as PyTorch holds them
    # --8<-- [end:same]
    start = p(raw, state)
    compiled = Functional(net, p, raw, state, backend)
    ways = {
        "torch, eager": Stateful(copy.deepcopy(theirs)),
        "torch, compiled": Stateful(theirs, backend),
        "funcparam, eager": Functional(net, p, raw, state),
        "funcparam, compiled": compiled,
    }
    losses, seconds, breaks = side_by_side(ways, train, steps)
    report(ways, losses, seconds, breaks)

    before = compiled.counter.graphs
    generator = torch.Generator().manual_seed(2)
    history = losses["funcparam, compiled"]
    for _ in tqdm(range(more), desc="training", disable=None):
        history.append(compiled(*draw(train, generator)).item())
    raw, state, _ = compiled.tensors
    params = p(raw, state)
    violations = p.violation(params, state)
    graphs = compiled.counter.graphs
    print(f"\nafter {more} steps more: {graphs} graph in all, {graphs - before} compiled again")
    print(
        f"bits a character on unseen text: {bits(net, start, test):.2f} before,"
        f" {bits(net, params, test):.2f} after"
    )
    for name, word in {"out": "orthogonal", "up": "spectral norm 1"}.items():
        worst = max(v.item() for path, v in violations.items() if f".{name}." in path)
        print(f"{word} to {worst:.0e}")
    picture(seconds, history, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
