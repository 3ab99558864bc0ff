"""Plain weights, brought back to their constraints after each step."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import (
    Ball,
    Cat,
    Interval,
    LoRA,
    LowerBound,
    LowRank,
    Mask,
    Orthogonal,
    Positive,
    Simplex,
    SpectralCap,
    SpectralNorm,
    Symmetric,
    UnitNorm,
    UpperBound,
)

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.3, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.3),
    "muon": partial(torch.optim.Muon, lr=0.3),
}
RULES = {
    "sphere": UnitNorm(),
    "norm kept": UnitNorm(dim=None, radius=None),
    "orthogonal": Orthogonal(),
    "box": Interval(-0.1, 0.2),
    "positive": Positive(),
    "mask": Mask(),
    "simplex": Simplex(),
    "symmetric": Symmetric(),
    "spectral": SpectralNorm(n_power_iterations=None),
}


def network(rule):
    net = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    p = fp.parametrize(net, {"weight": rule})
    with torch.no_grad():
        net.weight.copy_(
            net.weight.softmax(-1) / 10 if rule != Simplex() else net.weight.softmax(-1)
        )
        if rule == Mask():
            net.weight[0] = 0
    return net, p


def steps(net, optimizer, targets):
    for target in targets:
        optimizer.zero_grad()
        (net.weight * target).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_constraints_hold_after_any_optimizer(rule, make):
    net, p = network(rule)
    _, state = p.init(net)
    start = net.weight.detach().clone()
    optimizer = make(net.parameters())
    handle = fp.project_after(optimizer, p, net)
    steps(net, optimizer, torch.randn(5, 4, 4, dtype=torch.float64))
    assert p.violation(net, state)["weight"] < 1e-9
    assert not torch.allclose(net.weight, start)
    handle.remove()
    steps(net, optimizer, torch.randn(1, 4, 4, dtype=torch.float64))
    violation = p.violation(net, state)["weight"]
    assert violation > 1e-3 or rule in (Positive(), Mask(), Interval(-0.1, 0.2))


def test_the_nearest_point_on_the_sphere_and_on_the_stiefel_manifold():
    W = torch.randn(3, 4, dtype=torch.float64)
    p = fp.parametrize({"w": W}, {"w": UnitNorm()})
    torch.testing.assert_close(p.project({"w": W})["w"], W / W.norm(dim=1, keepdim=True))
    q = fp.parametrize({"w": W}, {"w": Orthogonal()})
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(q.project({"w": W})["w"], U @ Vh)


@pytest.mark.parametrize("off", [0.0, 1e-9, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (2, 5, 5)])
def test_the_nearest_frame_from_near_and_far(shape, off):
    """However many steps it takes to get there, in both precisions."""
    U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = 1 + off * (torch.rand(*shape[:-2], 1, min(shape[-2:]), dtype=torch.float64) * 1.9 - 0.95)
    for dtype, atol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        W = (U * s @ Vh).to(dtype)
        torch.testing.assert_close(
            Orthogonal().project(W, {}), (U @ Vh).to(dtype), rtol=0, atol=atol
        )


def test_what_has_no_rule_passes_through():
    net = nn.Linear(3, 3)
    p = fp.parametrize(net, {"weight": UnitNorm()})
    values = p.project(net)
    assert values["bias"] is net.bias
    grads = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}
    assert torch.equal(p.tangent(values, grads)["bias"], grads["bias"])
    moved = p.retract(values, grads)
    assert torch.equal(moved["bias"], net.bias + 1)
    expected = nn.functional.normalize(values["weight"] + 1, dim=-1)
    torch.testing.assert_close(moved["weight"], expected)


def test_hyperball():
    """W' = R N(W - lr R N(u)), with N(x) = x / |x| and R the norm at first: arXiv 2606.16899."""
    net = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    p = fp.parametrize(net, {"weight": UnitNorm(dim=None, radius=None)})
    theirs = net.weight.detach().clone().requires_grad_()
    R = theirs.norm().item()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    fp.relative_steps(optimizer, p, net)
    fp.project_after(optimizer, p, net)
    other = torch.optim.Adam([theirs], lr=1.0)
    for target in torch.randn(4, 3, 4, dtype=torch.float64):
        optimizer.zero_grad()
        (net.weight.sin() * target).sum().backward()
        optimizer.step()
        other.zero_grad()
        (theirs.sin() * target).sum().backward()
        with torch.no_grad():
            W = theirs.clone()
            other.step()
            u = W - theirs
            step = W - 0.1 * R * u / u.norm()
            theirs.copy_(R * step / step.norm())
        torch.testing.assert_close(net.weight, theirs)


def test_gradients_of_a_sparse_autoencoders_decoder():
    """The usual code: the part of the gradient along the rows is taken out, rows are normalised."""
    net = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    p = fp.parametrize(net, {"weight": UnitNorm()})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        net.weight.copy_(p.project(net)["weight"])
    theirs = copy.deepcopy(net)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    fp.tangent_before(optimizer, p, net)
    fp.project_after(optimizer, p, net)
    for target in torch.randn(4, 3, 4, dtype=torch.float64):
        steps(net, optimizer, [target])
        other.zero_grad()
        (theirs.weight * target).sum().backward()
        W, G = theirs.weight.data, theirs.weight.grad
        G -= (G * W).sum(-1, keepdim=True) * W
        other.step()
        W /= W.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(net.weight, theirs.weight)


def test_descent_on_the_stiefel_manifold():
    """Tangent gradients, a step, and the polar factor: Absil et al. (2008), section 4.1."""
    net = nn.Linear(3, 5, bias=False, dtype=torch.float64)
    nn.init.orthogonal_(net.weight)
    p = fp.parametrize(net, {"weight": Orthogonal()})
    V, A = net.weight.detach().clone(), torch.randn(5, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fp.tangent_before(optimizer, p, net)
    fp.project_after(optimizer, p, net)
    for _ in range(5):
        steps(net, optimizer, [A])
        sym = (V.mT @ A + A.mT @ V) / 2
        U, _, Vh = torch.linalg.svd(V - 0.1 * (A - V @ sym), full_matrices=False)
        V = U @ Vh
        torch.testing.assert_close(net.weight.detach(), V)


@pytest.mark.parametrize("projects_first", [False, True])
def test_the_order_of_the_two_hooks_does_not_matter(projects_first):
    net = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    p = fp.parametrize(net, {"weight": UnitNorm(dim=None, radius=None)})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hooks = [fp.relative_steps, fp.project_after]
    for attach in reversed(hooks) if projects_first else hooks:
        attach(optimizer, p, net)
    W, target = net.weight.detach().clone(), torch.randn(3, 4, dtype=torch.float64)
    steps(net, optimizer, [target])
    step = W - 0.1 * W.norm() * target / target.norm()
    torch.testing.assert_close(net.weight.detach(), step * W.norm() / step.norm())


@pytest.mark.parametrize(
    ("rule", "inside"),
    [
        (Interval(-0.1, 0.1), lambda W: W.clamp(-0.1, 0.1)),
        (LowerBound(0.0), lambda W: W.clamp_min(0)),
        (UpperBound(0.0), lambda W: W.clamp_max(0)),
        (Positive(), lambda W: W.clamp_min(0)),
        (Cat([Positive(), Interval(-0.1, 0.1)]), None),
    ],
    ids=["interval", "lower", "upper", "positive", "parts"],
)
def test_weights_begin_wherever_they_are(rule, inside):
    """On a boundary, too, where a projected run ends, and from which it is resumed."""
    net = nn.Linear(4, 4)
    p = fp.parametrize(net, {"weight": rule})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for _ in range(2):
        fp.tangent_before(optimizer, p, net)
        fp.project_after(optimizer, p, net)
    W = net.weight.detach().clone()
    steps(net, optimizer, torch.ones(1, 4, 4))
    if inside:
        torch.testing.assert_close(net.weight.detach(), inside(W))
    assert p.violation(net)["weight"] == 0
    fp.project_after(optimizer, p, net)


def test_state_may_be_that_of_some_weights():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    p = fp.parametrize(net, {"0.weight": Mask(), "1.weight": UnitNorm(dim=None, radius=None)})
    mask, norm = torch.eye(4, dtype=torch.bool), net[1].weight.norm()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fp.project_after(optimizer, p, net, state={"0.weight": {"mask": mask}})
    net(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert net[0].weight[~mask].eq(0).all()
    torch.testing.assert_close(net[1].weight.norm(), norm)


@pytest.mark.parametrize("attach", [fp.project_after, fp.tangent_before])
@pytest.mark.parametrize(
    "rule", [*RULES.values(), LowRank(2), SpectralCap(1.0), Ball(), SpectralNorm()], ids=str
)
def test_nan_stays_nan(rule, attach):
    net, p = network(rule)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(optimizer, p, net)
    for _ in range(2):
        optimizer.zero_grad()
        net.weight.sum().backward()
        net.weight.grad[0, 0] = torch.nan
        optimizer.step()
    assert net.weight.isnan().any() or rule == Mask()


def test_a_decomposition_that_fails_names_the_weight():
    W = torch.full((3, 3), torch.nan)
    with pytest.raises(torch.linalg.LinAlgError, match=r"^'w': "):
        fp.parametrize({"w": W}, {"w": LowRank(2)}).project({"w": W})


def test_with_groups_and_ties():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    p = fp.parametrize(net, {"0.weight": UnitNorm()})
    raw = dict(net.named_parameters())
    optimizer = fp.groups(raw, fp.parametrize(net, [])).optimizer()
    fp.project_after(optimizer, p, net)
    net(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(net[1].weight.norm(dim=1), torch.ones(4))
    assert net[1].weight is net[0].weight


@pytest.mark.parametrize("rule", [Mask(), UnitNorm(radius=None), Ball(), SpectralCap(1.0)], ids=str)
def test_a_constraint_in_state_that_is_not_given(rule):
    p = fp.parametrize({"w": torch.full((2, 2), 0.1)}, {"w": rule})
    with pytest.raises(ValueError, match="'w': .* expects state with '.*', which is its constr"):
        p.project({"w": torch.ones(2, 2)})
    _, state = p.init({"w": torch.full((2, 2), 0.1)})
    p.project({"w": torch.ones(2, 2)}, state)


def test_errors_come_before_the_first_step():
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD([net.bias], lr=0.1)
    with pytest.raises(ValueError, match="'weight': expected an optimizer that has this weight"):
        fp.project_after(optimizer, fp.parametrize(net, {"weight": UnitNorm()}), net)
    whole = torch.optim.SGD(net.parameters(), lr=0.1)
    lora = fp.parametrize(net, {"weight": LoRA(2)})
    for attach in (fp.project_after, fp.tangent_before):
        with pytest.raises(NotImplementedError, match="'weight': LoRA.* has no projection"):
            attach(whole, lora, net)
    with pytest.raises(NotImplementedError, match="'weight': LoRA.* has no projection"):
        lora.project(net)
    with pytest.raises(NotImplementedError, match="'weight': LoRA.* has no projection"):
        lora.retract(net, net.state_dict())
    with pytest.raises(ValueError, match="'weight': p has a rule for it, but the network has no"):
        fp.project_after(whole, fp.parametrize(net, {"weight": UnitNorm()}), nn.ReLU(), state={})
    p = fp.parametrize(net, {"weight": Mask()})
    for state, message in {
        "wieght": "state: unknown name 'wieght'; the closest names are 'weight'",
        "weight": r"state\['weight'\]\['mask'\]: expected bool \(4, 4\); got bool \(4, 2\)",
    }.items():
        mask = {state: {"mask": torch.ones(4, 2, dtype=torch.bool)}}
        with pytest.raises(ValueError, match=message):
            fp.project_after(whole, p, net, state=mask)
    for attach in (fp.project_after, fp.tangent_before, fp.relative_steps):
        for wrong in ({"weight": Mask()}, net):
            message = rf"p: expected a parametrization, in {attach.__name__}\(optimizer, p, net\)"
            with pytest.raises(TypeError, match=message):
                attach(whole, wrong, net)
        with pytest.raises(TypeError, match="optimizer: expected one"):
            attach(net, p, net)
    assert not whole._optimizer_step_post_hooks
    assert not whole._optimizer_step_pre_hooks
