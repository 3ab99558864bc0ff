"""Forward and backward of parametrized weights: funcparam, PyTorch's own module, one by one.

    python benchmarks/maps.py [--quick]

Every leaf is moved away from its initial value. "one by one" is the same without stacking, so that
the two ratios show what stacking gives at each size.
"""

import torch
from _report import Comparison, main
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
QUICK = [(1, 64), (32, 16), (1, 256)]
RATIOS = [("PyTorch", "funcparam"), ("PyTorch", "one by one")]


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

    return {"PyTorch": theirs, "funcparam": ours, "one by one": one_by_one}


def comparisons(*, quick=False):
    for kind in KINDS:
        entrywise = kind in ("weight_norm", "spectral_norm")
        for leaves, n in QUICK if quick else SIZES + LARGE * entrywise:
            yield Comparison({"map": kind, "leaves": leaves, "n": n}, setting(kind, leaves, n))


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
