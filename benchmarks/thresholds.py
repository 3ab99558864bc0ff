"""Up to which size stacking equal leaves pays, for every family of transforms.

    python benchmarks/thresholds.py [NAME ...] [--quick]

Forward and backward of k equal leaves, stacked and one by one, side by side; a cell is the time one
by one divided by the stacked time. The last column is what the transforms keep, `stacks_from` and
`stacks_up_to`.
"""

import argparse

import torch
from _timing import interleaved, machine, ratio

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
SIZES = (16, 32, 64, 128, 256)
LEAVES = (4, 8, 16)


def setting(name, leaves, n):
    """Forward and backward of the stack, and of each leaf by itself."""
    transform, make = TRANSFORMS[name]
    torch.manual_seed(0)
    values = {f"w{i}": torch.randn(n, n) if make is None else make(n) for i in range(leaves)}
    p = fp.parametrize(values, {"*": transform})
    raw, state = p.init(values)
    flat, spec = torch.utils._pytree.tree_flatten(raw)
    flat = [(x + 0.1 * torch.randn_like(x)).requires_grad_() for x in flat]
    raw = torch.utils._pytree.tree_unflatten(flat, spec)
    grads = [torch.randn(n, n) for _ in values]
    names = tuple(p)
    plan = Plan(p.entries)
    plan._eager = [(transform, names)], []  # at any size

    def one_by_one():
        found = [transform.forward(raw[k], state.get(k, {})) for k in names]
        torch.autograd.grad(found, flat, grads)

    def stacked():
        torch.autograd.grad(list(plan.evaluate(raw, state).values()), flat, grads)

    return {"one by one": one_by_one, "stacked": stacked}


def measure(name, quick):
    """One row a size and number of leaves, as dicts."""
    rounds, seconds = (3, 0.003) if quick else (7, 0.005)
    rows = []
    for n in SIZES:
        for leaves in LEAVES:
            times = interleaved(setting(name, leaves, n), rounds, seconds)
            gain, low, high = ratio(times, "one by one", "stacked")
            row = {"transform": name, "n": n, "leaves": leaves}
            rows.append({**row, "gain": gain, "low": low, "high": high})
    return rows


def kept(transform):
    side = round(transform.stacks_up_to**0.5)
    return f"from {transform.stacks_from}, to {side} x {side}" if side else "no"


def report(names=tuple(TRANSFORMS), *, quick=False):
    """All figures, and their table."""
    sizes = " | ".join(f"{n} x {n}" for n in SIZES)
    figures, lines = [], [f"| transform | {sizes} | stacked |", "| --- " * (len(SIZES) + 2) + "|"]
    for name in names[:2] if quick else names:
        rows = measure(name, quick)
        cells = [", ".join(f"{row['gain']:.1f}" for row in rows if row["n"] == n) for n in SIZES]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {kept(TRANSFORMS[name][0])} |")
        figures += rows
    return figures, "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=tuple(TRANSFORMS), help="transforms")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, two transforms")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n\n{report(arguments.names, quick=arguments.quick)[1]}")


if __name__ == "__main__":
    main()
