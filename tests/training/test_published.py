"""Published updates are a rule each, and equal to their formulas written by hand, step by step.

Hyperball, and the decoder of a sparse autoencoder, are in `test_projection.py`.
"""

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import (
    Affine,
    Ball,
    Chain,
    Interval,
    Mask,
    Orthogonal,
    SpectralNorm,
    UnitNorm,
)

D, STEPS, RATE = torch.float64, 6, 0.05


def gradients(net, target):
    """A loss in which weights are not linear."""
    net.zero_grad()
    sum((t.sin() * x).sum() for t, x in zip(net.parameters(), target, strict=True)).backward()


def targets(net):
    return [[torch.randn_like(tensor) for tensor in net.parameters()] for _ in range(STEPS)]


def side_by_side(net, rules, optimizer_of, by_hand, *, tangent=False):
    """Steps of a network under rules, and of a copy of its first weight by hand, compared."""
    p = fp.parametrize(net, rules)
    with torch.no_grad():
        net.load_state_dict(p.project(net, p.init(net)[1]))
    W = next(net.parameters()).detach().clone()
    optimizer = optimizer_of(net.parameters())
    if tangent:
        fp.tangent_before(optimizer, p, net)
    fp.project_after(optimizer, p, net)
    for target in targets(net):
        gradients(net, target)
        optimizer.step()
        W = by_hand(W, W.cos() * target[0])
        torch.testing.assert_close(next(net.parameters()).detach(), W)


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


class Along(torch.optim.Optimizer):
    """Steps in a direction that a function finds from the weight and its gradient."""

    def __init__(self, params, direction):
        super().__init__(params, {"lr": RATE})
        self.direction = direction

    @torch.no_grad()
    def step(self):
        for W in self.param_groups[0]["params"]:
            W -= RATE * self.direction(W, W.grad)


class AdamByHand:
    """Kingma and Ba, arXiv 1412.6980, algorithm 1, for one tensor."""

    def __init__(self):
        self.m, self.v, self.t = 0, 0, 0

    def __call__(self, G):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * G
        self.v = 0.999 * self.v + 0.001 * G.square()
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return m / (v.sqrt() + 1e-8)


def linear(rows, columns):
    return nn.Linear(columns, rows, bias=False, dtype=D)


def adam(tensors):
    return torch.optim.Adam(tensors, lr=RATE)


@pytest.mark.parametrize("dim", [-1, 0], ids=["q, k, v, up, gate", "out, down"])
def test_ngpt(dim):
    """Loshchilov et al., arXiv 2410.01131, section 2.6: unit vectors along the model's width."""
    step = AdamByHand()

    def by_hand(W, G):
        W = W - RATE * step(G)
        return W / W.norm(dim=dim, keepdim=True)

    side_by_side(linear(4, 6), {"weight": UnitNorm(dim=dim)}, adam, by_hand)


def test_edm2_forced_weight_normalization():
    """Karras et al., arXiv 2312.02696, appendix B.4, as in their networks_edm2.py.

    There the layer itself normalizes, and so its gradient is along the sphere.
    """
    net = nn.Conv2d(2, 4, 3, bias=False, dtype=D)
    n = net.weight[0].numel()

    def normalize(w):
        norm = torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True)
        return w / (norm * (norm.numel() / w.numel()) ** 0.5)

    p = fp.parametrize(net, {"weight": UnitNorm(dim=(1, 2, 3), radius=n**0.5)})
    w = net.weight.detach().clone().requires_grad_()
    with torch.no_grad():
        net.load_state_dict(p.project(net))
    ours, theirs = adam(net.parameters()), adam([w])
    fp.tangent_before(ours, p, net)
    fp.project_after(ours, p, net)
    for (target,) in targets(net):
        ours.zero_grad()
        ((net.weight / n**0.5).sin() * target).sum().backward()
        ours.step()
        with torch.no_grad():
            w.copy_(normalize(w))
        theirs.zero_grad()
        ((normalize(w) / n**0.5).sin() * target).sum().backward()
        theirs.step()
        torch.testing.assert_close(net.weight, normalize(w))


def test_muonsphere():
    """arXiv 2601.08393: W <- R W / sigma_1(W) behind Muon, R = c sqrt(rows / columns)."""
    net = nn.Linear(4, 6, dtype=D)
    R = 1.5 * (6 / 4) ** 0.5
    sphere = Chain(SpectralNorm(n_power_iterations=None), Affine(scale=R))
    p = fp.parametrize(net, {"weight": sphere})
    W, b = (tensor.detach().clone().requires_grad_() for tensor in net.parameters())
    optimizer = fp.groups(dict(net.named_parameters()), fp.parametrize(net, []), net).optimizer(
        matrices=lambda ts: torch.optim.Muon(ts, lr=RATE), rest=adam
    )
    fp.project_after(optimizer, p, net)
    muon, rest = torch.optim.Muon([W], lr=RATE), adam([b])
    for target in targets(net):
        gradients(net, target)
        optimizer.step()
        W.grad, b.grad = W.detach().cos() * target[0], b.detach().cos() * target[1]
        muon.step()
        rest.step()
        with torch.no_grad():
            W.mul_(R / torch.linalg.svdvals(W)[0])
        torch.testing.assert_close(net.weight, W)
        torch.testing.assert_close(net.bias, b)


def test_spel():
    """arXiv 2601.21487: W <- msign(W - a msign(P_T G)), P_T the tangent projection."""

    def by_hand(W, G):
        along = W.mT @ G
        return polar(W - RATE * polar(G - W @ (along + along.mT) / 2))

    def optimizer(tensors):
        return Along(tensors, lambda W, G: polar(G))

    side_by_side(linear(6, 4), {"weight": Orthogonal()}, optimizer, by_hand, tangent=True)


def test_manifold_muon():
    """Bernstein, Modular manifolds (2025): dual ascent for the step, and msign to come back."""

    def direction(W, G):
        multiplier = -(W.mT @ G + G.mT @ W) / 4
        for i in range(20):
            A = polar(G + 2 * W @ multiplier)
            multiplier = multiplier - 0.1 / (1 + i) * (W.mT @ A + A.mT @ W)
        return A

    def optimizer(tensors):
        return Along(tensors, direction)

    def by_hand(W, G):
        return polar(W - RATE * direction(W, G))

    side_by_side(linear(6, 4), {"weight": Orthogonal()}, optimizer, by_hand)


def test_a_box():
    """Goldstein (1964), Levitin and Polyak (1966): the gradient projection method."""
    net, step = linear(4, 6), AdamByHand()
    nn.init.uniform_(net.weight, -0.1, 0.1)
    rule = {"weight": Interval(-0.2, 0.1)}
    side_by_side(net, rule, adam, lambda W, G: (W - RATE * step(G)).clamp(-0.2, 0.1))


@pytest.mark.parametrize("p", [1, 2, float("inf")])
def test_a_ball(p):
    radius = 0.4

    def nearest(w):
        if p == 2:
            return w * min(1, radius / w.norm().item())
        if p == float("inf"):
            return w.clamp(-radius, radius)
        low, high = 0.0, w.abs().max().item()  # by halving, how much entries shrink
        for _ in range(100):
            middle = (low + high) / 2
            is_longer = (w.abs() - middle).clamp_min(0).sum() > radius
            low, high = (middle, high) if is_longer else (low, middle)
        return w.sign() * (w.abs() - high).clamp_min(0) if w.abs().sum() > radius else w

    def by_hand(W, G):
        return torch.stack([nearest(row) for row in W - RATE * G])

    def sgd(tensors):
        return torch.optim.SGD(tensors, lr=RATE)

    side_by_side(linear(4, 6), {"weight": Ball(p, radius, dim=-1)}, sgd, by_hand)


def test_a_mask():
    """Han et al., arXiv 1506.02626: connections that are pruned stay so."""
    net = linear(4, 6)
    with torch.no_grad():
        net.weight[net.weight.abs() < 0.2] = 0
    mask, momentum = net.weight.detach() != 0, torch.zeros(4, 6, dtype=D)

    def by_hand(W, G):
        momentum.mul_(0.9).add_(G)
        return (W - RATE * momentum) * mask

    def sgd(tensors):
        return torch.optim.SGD(tensors, lr=RATE, momentum=0.9)

    side_by_side(net, {"weight": Mask()}, sgd, by_hand)
    assert not mask.all()
