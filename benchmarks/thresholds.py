"""Up to which size stacking equal leaves pays, for every family of transforms.

    python benchmarks/thresholds.py [NAME ...] [--quick] [--device cuda] [--write]

Forward and backward of k equal leaves, stacked and one by one, side by side; a cell is the time one
by one divided by the stacked time. The last column is what is kept of it, in
`funcparam/transforms/contract/stacks.py`. --write puts there what this run finds for its device.
"""

import argparse
from math import log, prod
from pathlib import Path

import torch
from _timing import interleaved, machine, ratio
from torch.utils._pytree import tree_map

import funcparam as fp
from funcparam.parametrization.batching import Plan
from funcparam.transforms import (
    AOL,
    IA3,
    OFT,
    AlmostOrthogonal,
    BlockDiagonal,
    CholeskyFactor,
    Circulant,
    CorrelationCholesky,
    DoRA,
    DoublyStochastic,
    FakeQuantize,
    FixedRank,
    Interval,
    Invertible,
    Isospectral,
    Kronecker,
    LInfLipschitz,
    LoHa,
    LoRA,
    LowerBound,
    LowRank,
    Mask,
    Monarch,
    Ordered,
    Orthogonal,
    Positive,
    PositiveDefinite,
    PSDLowRank,
    Simplex,
    Skew,
    SpecialLinear,
    SpecialOrthogonal,
    SpectralNorm,
    Stiefel,
    Symmetric,
    Ternary,
    Toeplitz,
    Triangular,
    UnitNorm,
    UpperBound,
    VeRA,
    WeightNorm,
    WeightStandardization,
)


def skew_value(n):
    X = torch.randn(n, n)
    return X - X.mT


def definite(n):
    X = torch.randn(n, n)
    return X @ X.mT / n + torch.eye(n)


def factor(n):
    return torch.linalg.cholesky(definite(n))


TRANSFORMS = {
    "Orthogonal('matrix_exp')": (Orthogonal(), torch.eye),
    "Orthogonal('cayley')": (Orthogonal("cayley"), torch.eye),
    "Orthogonal('householder')": (Orthogonal("householder"), torch.eye),
    "Orthogonal('qr')": (Orthogonal("qr"), torch.eye),
    "Orthogonal('newton_schulz')": (Orthogonal("newton_schulz"), torch.eye),
    "SpecialOrthogonal": (SpecialOrthogonal(), torch.eye),
    "Stiefel": (Stiefel(), torch.eye),
    "FixedRank": (FixedRank(4), torch.eye),
    "AlmostOrthogonal": (AlmostOrthogonal(0.1), torch.eye),
    "Invertible": (Invertible(), torch.eye),
    "Isospectral": (Isospectral(), torch.eye),
    "SpecialLinear": (SpecialLinear(), torch.eye),
    "SpectralNorm": (SpectralNorm(), None),
    "SpectralNorm(n_power_iterations=None)": (SpectralNorm(n_power_iterations=None), None),
    "WeightNorm": (WeightNorm(), None),
    "WeightNorm(dim=1)": (WeightNorm(dim=1), None),
    "WeightStandardization": (WeightStandardization(), None),
    "LInfLipschitz": (LInfLipschitz(), None),
    "AOL": (AOL(), torch.eye),
    "UnitNorm": (UnitNorm(), lambda n: torch.nn.functional.normalize(torch.randn(n, n), dim=-1)),
    "Positive": (Positive(), lambda n: torch.rand(n, n) + 0.1),
    "LowerBound": (LowerBound(0), lambda n: torch.rand(n, n) + 0.1),
    "UpperBound": (UpperBound(0), lambda n: -torch.rand(n, n) - 0.1),
    "Interval": (Interval(-1, 1), lambda n: torch.rand(n, n) - 0.5),
    "Simplex": (Simplex(), lambda n: torch.randn(n, n).softmax(-1)),
    "Ordered": (Ordered(), lambda n: torch.rand(n, n).add(0.1).cumsum(-1)),
    "Symmetric": (Symmetric(), lambda n: torch.eye(n)),
    "Skew": (Skew(), skew_value),
    "Triangular": (Triangular(), lambda n: torch.randn(n, n).tril()),
    "CholeskyFactor": (CholeskyFactor(), factor),
    "PositiveDefinite": (PositiveDefinite(), definite),
    "PSDLowRank": (PSDLowRank(2), lambda n: torch.ones(n, n)),
    "CorrelationCholesky": (
        CorrelationCholesky(),
        lambda n: torch.nn.functional.normalize(factor(n), dim=-1),
    ),
    "DoublyStochastic": (DoublyStochastic(), lambda n: torch.full((n, n), 1 / n)),
    "LowRank": (LowRank(2), lambda n: torch.ones(n, n)),
    "LoRA": (LoRA(rank=4), None),
    "DoRA": (DoRA(rank=4), None),
    "VeRA": (VeRA(rank=4), None),
    "LoHa": (LoHa(rank=4), None),
    "OFT": (OFT(blocks=2), None),
    "IA3": (IA3(), None),
    "Mask": (Mask(), None),
    "FakeQuantize": (FakeQuantize(8), None),
    "Ternary": (Ternary(), None),
    "Circulant": (Circulant(), torch.eye),
    "Toeplitz": (Toeplitz(), torch.eye),
    "BlockDiagonal": (BlockDiagonal(2), torch.eye),
    "Kronecker": (Kronecker((2, 2)), torch.eye),
    "Monarch": (Monarch(2), None),
}
SIZES = {"cpu": (16, 32, 64, 128, 256), "cuda": (32, 64, 128, 256, 512)}
LEAVES = (4, 8, 16)
KEPT = Path(__file__).parents[1] / "funcparam" / "transforms" / "contract" / "stacks.py"


def setting(name, leaves, n, device="cpu"):
    """Forward and backward of the stack, and of each leaf by itself."""
    transform, make = TRANSFORMS[name]
    torch.manual_seed(0)
    values = {f"w{i}": torch.randn(n, n) if make is None else make(n) for i in range(leaves)}
    p = fp.parametrize(values, {"*": transform})
    raw, state = tree_map(lambda t: t.to(device), p.init(values))
    flat, spec = torch.utils._pytree.tree_flatten(raw)
    flat = [(x + 0.1 * torch.randn_like(x)).requires_grad_() for x in flat]
    raw = torch.utils._pytree.tree_unflatten(flat, spec)
    grads = [torch.randn(n, n, device=device) for _ in values]
    names = tuple(p)
    plan = Plan(p.entries)
    plan._by_kind = {device: [([(transform, names)], [])] * 2}  # at any size

    def one_by_one():
        found = [transform.forward(raw[k], state.get(k, {})) for k in names]
        torch.autograd.grad(found, flat, grads)

    def stacked():
        torch.autograd.grad(list(plan.evaluate(raw, state).values()), flat, grads)

    return {"one by one": one_by_one, "stacked": stacked}


def measure(name, quick, device="cpu"):
    """One row a size and number of leaves, as dicts."""
    rounds, seconds = (3, 0.003) if quick else (7, 0.005)
    rows = []
    for n in SIZES[device][:2] if quick else SIZES[device]:
        for leaves in LEAVES:
            times = interleaved(setting(name, leaves, n, device), rounds, seconds, device)
            gain, low, high = ratio(times, "one by one", "stacked")
            row = {"transform": name, "n": n, "leaves": leaves}
            rows.append({**row, "gain": gain, "low": low, "high": high})
    return rows


def decided(rows):
    """From how many leaves on, and up to how many entries, a stack pays; None where nowhere.

    A size pays with so many leaves, and more, if none of them loses a twentieth and they gain a
    tenth in the mean. Of the regions of paying sizes, the smallest on, it is the one with the
    largest product of gains.
    """
    gains = {(row["n"], row["leaves"]): row["gain"] for row in rows}
    best, found = 0.0, None
    for fewest in LEAVES:
        total = 0.0
        for n in sorted({n for n, _ in gains}):
            own = [gains[n, k] for k in LEAVES if k >= fewest]
            if min(own) < 0.95 or prod(own) ** (1 / len(own)) < 1.1:
                break
            total += sum(map(log, own))
            if total > best:
                best, found = total, (fewest, n * n)
    return found


def kept(transform, device="cpu"):
    found = transform.stacks(device)
    return f"from {found[0]}, to {round(found[1] ** 0.5)} x {round(found[1] ** 0.5)}" * bool(found)


def report(names=tuple(TRANSFORMS), *, quick=False, device="cpu"):
    """All figures, and their table."""
    sizes = SIZES[device][:2] if quick else SIZES[device]
    head = " | ".join(f"{n} x {n}" for n in sizes)
    figures, lines = [], [f"| transform | {head} | stacked |", "| --- " * (len(sizes) + 2) + "|"]
    for name in names[:2] if quick else names:
        rows = measure(name, quick, device)
        cells = [", ".join(f"{row['gain']:.1f}" for row in rows if row["n"] == n) for n in sizes]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {kept(TRANSFORMS[name][0], device)} |")
        figures += rows
    return figures, "\n".join(lines)


def written(source, figures, device, conditions):
    """The file of what is kept, with the part of this device from figures.

    Of a class that was measured with several arguments, the first counts.
    """
    found = {}
    for name in dict.fromkeys(row["transform"] for row in figures):
        kind = type(TRANSFORMS[name][0]).__name__
        found.setdefault(kind, decided([row for row in figures if row["transform"] == name]))
    lines = [f"    # {conditions}", f'    "{device}": {{']
    for kind, stacks in sorted(found.items()):
        if stacks is not None:
            side = round(stacks[1] ** 0.5)
            lines.append(f'        "{kind}": ({stacks[0]}, {side} * {side}),')
    lines.append("    },")
    head, rest = source.split("] = {\n", 1)
    body, tail = rest.split("\n}\n", 1)
    blocks = [block for block in _blocks(body) if f'    "{device}": {{' not in block]
    blocks.append("\n".join(lines))
    return head + "] = {\n" + "\n".join(blocks) + "\n}\n" + tail


def _blocks(body):
    """The parts of the table, each with the comment above it."""
    return [f"{block}\n    }}," for block in body.removesuffix("\n    },").split("\n    },\n")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=tuple(TRANSFORMS), help="transforms")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, two transforms")
    parser.add_argument("--device", default="cpu", choices=SIZES, help="where leaves are")
    parser.add_argument("--write", action="store_true", help="keep what this finds")
    given = parser.parse_args()
    if given.write and (given.quick or tuple(given.names) != tuple(TRANSFORMS)):
        parser.error("--write keeps the figures of all transforms, measured in full")
    torch.set_num_threads(1)
    figures, table = report(given.names, quick=given.quick, device=given.device)
    print(f"{machine(given.device)}\n\n{table}")
    if given.write:
        source = KEPT.read_text(encoding="utf-8")
        new = written(source, figures, given.device, machine(given.device))
        KEPT.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
