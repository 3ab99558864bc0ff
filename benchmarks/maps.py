"""Forward and backward of parametrized weights: funcparam, PyTorch's own module, one by one.

    python benchmarks/maps.py [--quick] [--json FILE]

Every leaf is moved away from its initial value. A ratio is PyTorch's time divided by funcparam's,
the median over interleaved rounds with quartiles; above 1 funcparam is faster. "one by one" is the
same without stacking, so that the two columns show what stacking gives at each size.
"""

import argparse
import json
import statistics

import torch
from _timing import interleaved, machine, ratio
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import funcparam as fp
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm

KINDS = {
    "matrix_exp": (Orthogonal("matrix_exp"), "orthogonal", {"orthogonal_map": "matrix_exp"}),
    "cayley": (Orthogonal("cayley"), "orthogonal", {"orthogonal_map": "cayley"}),
    "householder": (Orthogonal("householder"), "orthogonal", {"orthogonal_map": "householder"}),
    "spectral_norm": (SpectralNorm(), "spectral_norm", {}),
    "weight_norm": (WeightNorm(), "weight_norm", {}),
}
SIZES = [
    (1, 16),
    (32, 16),
    (96, 32),
    (1, 64),
    (8, 64),
    (32, 64),
    (1, 128),
    (8, 128),
    (1, 256),
    (8, 256),
]
LARGE = [(1, 1024), (4, 1024)]


def setting(kind, leaves, n):
    """Three functions that map all leaves and differentiate."""
    transform, name, options = KINDS[kind]
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(n, n, bias=False) for _ in range(leaves))
    grads = [torch.randn(n, n) for _ in range(leaves)]
    p = fp.parametrize(net, {"*.weight": transform})
    raw, state = p.init(net)
    raw, spec = torch.utils._pytree.tree_flatten(raw)
    raw = [(x + 0.1 * torch.randn_like(x)).requires_grad_() for x in raw]
    tree = torch.utils._pytree.tree_unflatten(raw, spec)
    for layer in net:
        getattr(torch_parametrizations, name)(layer, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    net.eval()  # neither side steps its power iteration
    parameters = list(net.parameters())

    def ours():
        torch.autograd.grad(list(p(tree, state).values()), raw, grads)

    def one_by_one():
        values = [p[k].forward(tree[k], state.get(k, {})) for k in p]
        torch.autograd.grad(values, raw, grads)

    def theirs():
        torch.autograd.grad([layer.weight for layer in net], parameters, grads)

    return {"torch": theirs, "funcparam": ours, "one by one": one_by_one}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no large weights")
    parser.add_argument("--json", help="write all figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 5 if arguments.quick else 11
    figures = []
    print(machine())
    print()
    print("| map | leaves | n | PyTorch, ms | funcparam, ms | ratio | one by one |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        elementwise = kind in ("weight_norm", "spectral_norm")
        sizes = SIZES + (LARGE if elementwise and not arguments.quick else [])
        for leaves, n in sizes:
            times = interleaved(setting(kind, leaves, n), rounds)
            middle = {name: statistics.median(found) * 1e3 for name, found in times.items()}
            gain, low, high = ratio(times, "torch", "funcparam")
            alone = ratio(times, "torch", "one by one")[0]
            print(
                f"| {kind} | {leaves} | {n} | {middle['torch']:.3f} | {middle['funcparam']:.3f}"
                f" | {gain:.2f} ({low:.2f} to {high:.2f}) | {alone:.2f} |",
                flush=True,
            )
            figures.append({"map": kind, "leaves": leaves, "n": n, "seconds": times})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine(), "figures": figures}, file)


if __name__ == "__main__":
    main()
