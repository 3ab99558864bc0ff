"""One training step of an MLP and of a transformer: funcparam beside PyTorch's module.

    python benchmarks/step.py [--quick]

Forward, backward and SGD: 8 Linear(64, 64) on a batch of 32, and 4 layers of width 256 with 1024
hidden units, whose two weights each are parametrized, on 8 sequences of 32. "shell" trains
`fp.Parametrized`; "functional" calls the network by a prepared functional call; "by hand" is the
bound: the mathematics written out for one stack, and the values put into the layers' tables without
a look.
"""

import by_hand
import torch
from _report import Comparison, main
from maps import KINDS
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import funcparam as fp

RATIOS = [
    ("PyTorch", "shell"),
    ("PyTorch", "functional"),
    ("shell", "by hand"),
    ("functional", "by hand"),
]


def mlp():
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers)


def transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4)


NETS = {
    "MLP": (mlp, "*.weight", (32, 64)),
    "transformer": (transformer, "*.linear?.weight", (8, 32, 256)),
}


def stepping(parameters, output):
    optimizer = torch.optim.SGD(parameters, lr=1e-4)

    def step():
        optimizer.zero_grad()
        output().square().mean().backward()
        optimizer.step()

    return step


def setting(kind, net):
    transform, name, options = KINDS[kind]
    make, pattern, shape = net
    x = torch.randn(shape)

    p = fp.parametrize(make(), {pattern: transform})
    theirs = make()
    for weight in p:
        layer = theirs.get_submodule(weight.rpartition(".")[0])
        getattr(nn.utils.parametrizations, name)(layer, **options)
    shell = fp.Parametrized(make(), p)
    for module in (theirs, shell):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    own = make()
    call = fp.functional_call(own)
    raw, state = p.init(own)
    raw = tree_map(lambda t: (t + 0.1 * torch.randn_like(t)).requires_grad_(), raw)
    holder = {"state": state}

    def functional():
        values, holder["state"] = p.advance(raw, holder["state"])
        return call(values, (x,))

    functions = {
        "PyTorch": stepping(theirs.parameters(), lambda: theirs(x)),
        "shell": stepping(shell.parameters(), lambda: shell(x)),
        "functional": stepping(tree_leaves(raw), functional),
    }
    if make is mlp:
        functions["by hand"] = bound(kind, own, p, raw, state, x)
    return functions


def bound(kind, net, p, raw, state, x):
    """The step with no library."""
    hand = by_hand.MAPS[kind]
    leaves, owns = [raw[name] for name in p], [dict(state.get(name, {})) for name in p]
    places = [net.get_submodule(name.rpartition(".")[0])._parameters for name in p]
    biases = [place["bias"] for place in places]

    def output():
        before = [place["weight"] for place in places]
        for place, value in zip(places, hand(leaves, owns), strict=True):
            place["weight"] = value
        out = net(x)
        for place, old in zip(places, before, strict=True):
            place["weight"] = old
        return out

    return stepping([*tree_leaves(leaves), *biases], output)


def comparisons(*, quick=False):
    for which in ("MLP",) if quick else NETS:
        for kind in KINDS:
            if (kind, which) == ("matrix_exp", "transformer"):  # 20 seconds a step, of 1024 x 1024
                continue
            yield Comparison({"map": kind, "net": which}, setting(kind, NETS[which]))


if __name__ == "__main__":
    main(__doc__, comparisons, RATIOS)
