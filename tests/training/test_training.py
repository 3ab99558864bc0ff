"""Constraints hold through training: optimizer steps, weight decay, low precision."""

import pytest
import torch
from torch.func import grad

import funcparam as fp
from funcparam.transforms import Orthogonal
from tests.networks import Classifier

MAPS = ["matrix_exp", "cayley", "householder"]


def error(W):
    W = W.double()
    W = W.mT if W.shape[-2] < W.shape[-1] else W
    return (W.mT @ W - torch.eye(W.shape[-1], dtype=torch.float64)).abs().max().item()


def trained(n, map, steps, dtype=torch.float32, weight_decay=0.1, lr=1e-2):
    """Pull an orthogonal weight towards a random one by AdamW with weight decay."""
    tree = {"w": torch.linalg.qr(torch.randn(n, n)).Q}
    target = torch.linalg.qr(torch.randn(n, n)).Q
    p = fp.parametrize(tree, {"w": Orthogonal(map)})
    raw, state = p.init(tree)
    X = raw["w"].requires_grad_()
    optimizer = torch.optim.AdamW([X], lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        (p({"w": X}, state)["w"] - target).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        raw, state = {"w": X.to(dtype)}, {"w": {"base": state["w"]["base"].to(dtype)}}
        return p(raw, state)["w"], tree["w"]


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("n", [16, 128, 256])
def test_orthogonal_after_200_steps_with_weight_decay(n, map):
    value, start = trained(n, map, steps=200)
    assert error(value) < 1e-5
    assert (value - start).abs().max() > 0.1  # it went somewhere


@pytest.mark.parametrize("map", [*MAPS, "qr", "newton_schulz"])
def test_orthogonal_procrustes_reaches_its_optimum(map):
    M = torch.randn(8, 3, dtype=torch.float64)
    tree = {"w": torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q}
    p = fp.parametrize(tree, {"w": Orthogonal(map)})
    raw, state = p.init(tree)
    optimizer = torch.optim.Adam([raw["w"].requires_grad_()], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-(p(raw, state)["w"] * M).sum()).backward()
        optimizer.step()
    best = torch.linalg.svdvals(M).sum()  # trace(W^T M) at the polar factor of M
    assert (p(raw, state)["w"] * M).sum() > (1 - 1e-6) * best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("map", MAPS)
def test_low_precision_is_bounded(map, dtype):
    value, _ = trained(64, map, steps=50, dtype=dtype)
    assert value.dtype == dtype
    assert error(value) < 4 * torch.finfo(dtype).eps


def test_the_twelve_lines():
    import torch.nn.functional as F
    from torch.func import functional_call, vmap

    from funcparam.transforms import WeightNorm

    net = Classifier().eval()
    p = fp.parametrize(net, {"rnn.weight_hh_*": Orthogonal(), "head.weight": WeightNorm(dim=0)})
    raw, state = p.init(net)

    def loss(raw, state, x, y):
        return F.cross_entropy(functional_call(net, p(raw, state), (x,)), y)

    x, y = torch.randn(6, 5, 3), torch.randint(4, (6,))
    g = grad(loss)(raw, state, x, y)
    assert g.keys() == raw.keys()
    assert g["head.weight"]["direction"].shape == (4, 8)
    losses = vmap(lambda a: loss({**raw, "head.bias": a}, state, x, y))(torch.randn(3, 4))
    assert losses.shape == (3,)
