"""What `p(raw, state)` costs beside the same maps in a hand-written loop, forward.

    python benchmarks/evaluation.py [--quick]

By hand: a loop over the weights that are parametrized, with the bare mathematics and a copied
dictionary, as one would write it first.
"""

import itertools

import torch
from _report import Comparison, main
from torch.utils._pytree import tree_map

import funcparam as fp
from funcparam.transforms import Orthogonal, WeightNorm

RATIOS = [("by hand", "funcparam")]


def normed(raw, _):
    g, v = raw["magnitude"], raw["direction"]
    return v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))


def cayley(raw, state):
    A = raw.tril() - raw.tril().mT
    eye = torch.eye(len(A))
    return state["base"] @ (2 * torch.linalg.inv(eye - A / 2) - eye)


BY_HAND = {WeightNorm(): normed, Orthogonal("cayley"): cayley}


def comparison(transforms, leaves, width):
    tree = {f"layer.{i}.weight": torch.randn(width, width) for i in range(leaves)}
    chosen = list(tree)[::10] if leaves > 10 else list(tree)[::5]
    p = fp.parametrize(tree, dict(zip(chosen, itertools.cycle(transforms))))
    raw, state = p.init(tree)
    raw = tree_map(torch.Tensor.requires_grad_, raw)

    def by_hand():
        values = dict(raw)
        for name, transform in p.items():
            values[name] = BY_HAND[transform](raw[name], state.get(name, {}))
        return values

    torch.testing.assert_close(by_hand(), p(raw, state))
    case = {
        "transforms": " and ".join(f"`{t!r}`" for t in transforms),
        "n": width,
        "parametrized / all": f"{len(chosen)} / {leaves}",
    }
    return Comparison(case, {"by hand": by_hand, "funcparam": lambda: p(raw, state)})


def comparisons(*, quick=False):
    counts = (10, 100) if quick else (10, 100, 1000)
    for width in (64, 256):
        for leaves in counts:
            yield comparison([WeightNorm()], leaves, width)
    for leaves in counts:
        yield comparison([Orthogonal("cayley")], leaves, 64)
    for leaves in counts:
        yield comparison([WeightNorm(), Orthogonal("cayley")], leaves, 128)


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
