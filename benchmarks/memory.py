"""Bytes and time of networks with large weights: funcparam beside PyTorch's module.

    python benchmarks/memory.py

Twelve square layers in a row, on a batch of 128. Bytes are those of the storages that
operations allocate, counted exactly: the most that live at one time beyond raw, its gradients and
the input. In "training" the gradients are there from the step before and are added to; "made anew"
they are of the step, and count. "evaluation" is a forward without gradients. Times are those of a
training step and of an evaluation; rounds alternate between the sides.
"""

import weakref

import torch
from _timing import interleaved, machine, ratio
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import funcparam as fp
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm

KINDS = {
    "weight_norm": (WeightNorm(), "weight_norm", {}),
    "spectral_norm": (SpectralNorm(), "spectral_norm", {}),
    "cayley": (Orthogonal("cayley"), "orthogonal", {"orthogonal_map": "cayley"}),
}
SIZES = {"weight_norm": 2048, "spectral_norm": 2048, "cayley": 512}
SIDES = "torch", "funcparam", "recompute"
LAYERS, BATCH = 12, 128
HEAD = (
    "| map | n | side | training, MiB (part of torch's) | gradients made anew | evaluation"
    " | time of a step / torch's | of an evaluation |"
)


class Allocated(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while this is entered."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(storage) for storage in _storages((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in given and id(storage) not in self._alive:
                self._count(storage)
        return out

    def _count(self, storage):
        key, size = id(storage), storage.nbytes()

        def gone(_):
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def peak(function):
    """The most bytes that a call of `function` allocates at one time."""
    with Allocated() as allocated:
        function()
    return allocated.peak


def networks(kind, n, layers):
    """The network on all sides, raw away from where it starts."""
    transform, name, options = KINDS[kind]

    def plain():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(n, n) for _ in range(layers)])

    theirs = plain()
    for layer in theirs:
        getattr(nn.utils.parametrizations, name)(layer, **options)
    p = fp.parametrize(plain(), {"*.weight": transform})
    made = theirs, fp.Parametrized(plain(), p), fp.Parametrized(plain(), p, recompute=True)
    for net in made:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    return dict(zip(SIDES, made, strict=True))


def stepping(net, x, *, anew=False):
    """A training step but for the optimizer, whose memory is the same on all sides."""

    def step():
        if not net.training:
            net.train()
        net.zero_grad(set_to_none=anew)
        net(x).square().mean().backward()

    return step


def evaluating(net, x):
    @torch.no_grad()
    def evaluate():
        if net.training:
            net.eval()
        net(x)

    return evaluate


def measure(kind, n, layers, batch):
    """Bytes by side, as a list of dicts."""
    x = torch.randn(batch, n)
    rows = []
    for side, net in networks(kind, n, layers).items():
        step, evaluate = stepping(net, x), evaluating(net, x)
        step()  # afterwards the gradients are there
        rows.append(
            {
                "kind": kind,
                "side": side,
                "raw": sum(p.nbytes for p in net.parameters()),
                "training": peak(step),
                "evaluation": peak(evaluate),
                "anew": peak(stepping(net, x, anew=True)),
            }
        )
    return rows


def clock(kind, n, layers, batch, rounds):
    """Seconds of a training step and of an evaluation, by side and round."""
    x = torch.randn(batch, n)
    nets = networks(kind, n, layers)
    steps = {side: stepping(net, x) for side, net in nets.items()}
    evaluations = {side: evaluating(net, x) for side, net in nets.items()}
    return {
        "training": interleaved(steps, rounds),
        "evaluation": interleaved(evaluations, rounds),
    }


def report(*, quick):
    """Bytes and seconds of all cases, and a table of them."""
    sizes, rounds = (dict.fromkeys(KINDS, 384), 5) if quick else (SIZES, 9)
    figures, lines = [], [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for kind, n in sizes.items():
        rows = measure(kind, n, LAYERS, BATCH)
        seconds = clock(kind, n, LAYERS, BATCH, rounds)
        figures.append({"case": {"map": kind, "n": n}, "bytes": rows, "seconds": seconds})
        lines += [_line(row, rows[0], seconds, n) for row in rows]
    return figures, "\n".join(lines)


def _line(row, first, seconds, n):
    cells = [row["kind"], n, row["side"]]
    for what in ("training", "anew", "evaluation"):
        cells.append(f"{row[what] / 2**20:.1f} ({row[what] / first[what]:.2f})")
    for what in ("training", "evaluation"):
        middle, low, high = ratio(seconds[what], row["side"], "torch")
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return f"| {' | '.join(map(str, cells))} |"


def main():
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print(report(quick=False)[1])


if __name__ == "__main__":
    main()
