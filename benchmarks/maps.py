"""Forward and backward of parametrized weights: funcparam, PyTorch's own module, geotorch.

    python benchmarks/maps.py [--quick]

Every leaf is moved away from its initial value. "one by one" is the same without stacking, so that
the two ratios show what stacking gives at each size. "by hand" is the bound on what stacking can
give: the mathematics written out for one stack, nothing checked.
"""

import by_hand
import torch
from _peers import peer
from _report import Comparison, main
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import funcparam as fp
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm

geotorch = peer("geotorch")

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
QUICK = [(1, 64), (32, 16), (1, 256)]
RATIOS = [
    ("PyTorch", "funcparam"),
    ("PyTorch", "one by one"),
    ("PyTorch", "by hand"),
    ("geotorch", "funcparam"),
]
GEOTORCH = {"matrix_exp": "expm", "cayley": "cayley"}
BY_HAND = by_hand.MAPS | {"spectral_norm": by_hand.spectral_division}


def setting(kind, leaves, n):
    """Functions that map all leaves and differentiate."""
    transform, name, options = KINDS[kind]
    torch.manual_seed(0)
    grads = [torch.randn(n, n) for _ in range(leaves)]
    p = fp.parametrize(linears(leaves, n), {"*.weight": transform})
    raw, state = p.init(linears(leaves, n))
    raw, spec = torch.utils._pytree.tree_flatten(raw)
    raw = [(x + 0.1 * torch.randn_like(x)).requires_grad_() for x in raw]
    tree = torch.utils._pytree.tree_unflatten(raw, spec)
    owns = [dict(state.get(name, {})) for name in p]

    def ours():
        torch.autograd.grad(list(p(tree, state).values()), raw, grads)

    def one_by_one():
        values = [p[k].forward(tree[k], state.get(k, {})) for k in p]
        torch.autograd.grad(values, raw, grads)

    def hand():
        torch.autograd.grad(list(BY_HAND[kind](list(tree.values()), owns)), raw, grads)

    def registered(register):
        net = linears(leaves, n)
        for layer in net:
            register(layer)
        net.eval()  # no side steps its power iteration
        parameters = list(net.parameters())
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
        return lambda: torch.autograd.grad([x.weight for x in net], parameters, grads)

    made = getattr(torch_parametrizations, name)
    functions = {"PyTorch": registered(lambda layer: made(layer, **options))}
    if kind in GEOTORCH and geotorch:
        triv = GEOTORCH[kind]
        functions["geotorch"] = registered(
            lambda layer: geotorch.orthogonal(layer, "weight", triv=triv)
        )
    functions |= {"funcparam": ours, "one by one": one_by_one}
    if leaves > 1 and n <= 64:
        functions["by hand"] = hand
    return functions


def linears(leaves, n):
    return nn.ModuleList(nn.Linear(n, n, bias=False) for _ in range(leaves))


def comparisons(*, quick=False):
    for kind in KINDS:
        entrywise = kind in ("weight_norm", "spectral_norm")
        for leaves, n in QUICK if quick else SIZES + LARGE * entrywise:
            yield Comparison({"map": kind, "leaves": leaves, "n": n}, setting(kind, leaves, n))


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
