"""Moves: the same values from another raw, in the tensors that an optimizer has."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import (
    Affine,
    Chain,
    Frozen,
    LoRA,
    Orthogonal,
    Positive,
    SpectralNorm,
    Stiefel,
    Symmetric,
    UnitNorm,
    WeightNorm,
)

OPTIMIZERS = {
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=0.05, momentum=0.9),
    "adam": lambda tensors: torch.optim.Adam(tensors, lr=0.05, amsgrad=True),
    "muon": lambda tensors: torch.optim.Muon(tensors, lr=0.05),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def trained(p, values, make, steps=3):
    """Raw, state and an optimizer that has taken some steps towards a random target."""
    raw, state = p.init(values)
    optimizer = make(fp.trainable(raw))
    for target in torch.randn(steps, *values["w"].shape, dtype=values["w"].dtype):
        step(p, raw, state, optimizer, target)
    return raw, state, optimizer


def step(p, raw, state, optimizer, target):
    optimizer.zero_grad()
    (p(raw, state)["w"] * target).sum().backward()
    optimizer.step()


def rules(transform):
    values = {"w": torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q}
    return values, fp.parametrize(values, {"w": transform})


@every_optimizer
def test_rebase_keeps_values_tensors_and_training(make):
    values, p = rules(Orthogonal())
    raw, state, optimizer = trained(p, values, make)
    before = p(raw, state)["w"].detach().clone()
    moved, new_state = fp.move(p, p, raw, state, optimizer)
    assert moved["w"] is raw["w"]
    assert raw["w"].requires_grad
    assert raw["w"].eq(0).all()
    torch.testing.assert_close(p(moved, new_state)["w"], before)
    assert not any(t.requires_grad for t in new_state["w"].values())
    step(p, moved, new_state, optimizer, torch.randn(4, 4, dtype=torch.float64))
    assert (p(moved, new_state)["w"] - before).abs().max() > 1e-3


def test_a_gradient_is_carried_exactly():
    """A first moment that is one gradient becomes the gradient by the new raw."""
    values, p = rules(Orthogonal("cayley"))
    target = torch.randn(4, 4, dtype=torch.float64)
    raw, state = p.init(values)
    with torch.no_grad():
        raw["w"].normal_(0, 0.3)
    optimizer = torch.optim.SGD(fp.trainable(raw), lr=0.0, momentum=0.9)
    step(p, raw, state, optimizer, target)
    raw, state = fp.move(p, p, raw, state, optimizer)
    optimizer.zero_grad()
    (p(raw, state)["w"] * target).sum().backward()
    torch.testing.assert_close(optimizer.state[raw["w"]]["momentum_buffer"], raw["w"].grad)


@pytest.mark.parametrize("scale", [1.0, 1e-25], ids=["usual", "tiny"])
@pytest.mark.parametrize("transform", [Stiefel(), UnitNorm(), Orthogonal("cayley")], ids=str)
def test_moments_are_carried_as_well_in_single_precision(transform, scale):
    """The solution is that of double precision, and does not run away once it is reached."""
    start = torch.linalg.qr(torch.randn(8, 24).mT).Q.mT.contiguous()
    target, momentum = torch.randn(2, 8, 24)
    found = []
    for dtype in (torch.float32, torch.float64):
        values = {"w": start.to(dtype)}
        p = fp.parametrize(values, {"w": transform})
        raw, state = p.init(values)
        optimizer = torch.optim.SGD(fp.trainable(raw), lr=0.05, momentum=0.9)
        step(p, raw, state, optimizer, target.to(dtype))
        # not only what a gradient can be
        optimizer.state[raw["w"]]["momentum_buffer"].copy_(scale * momentum)
        fp.move(p, p, raw, state, optimizer)
        found.append(optimizer.state[raw["w"]]["momentum_buffer"].double() / scale)
    single, double = found
    assert double.abs().max() > 0.1
    torch.testing.assert_close(single, double, rtol=0, atol=1e-4)


def test_squares_are_carried_exactly_by_scales():
    """From w = 2 x to w = 4 y: gradients double, their squares quadruple."""
    values, p = rules(Affine(scale=2.0))
    q = fp.parametrize(values, {"w": Affine(scale=4.0)})
    raw, state, optimizer = trained(p, values, OPTIMIZERS["adam"])
    old = {k: v.clone() for k, v in optimizer.state[raw["w"]].items()}
    fp.move(p, q, raw, state, optimizer)
    new = optimizer.state[raw["w"]]
    torch.testing.assert_close(new["exp_avg"], 2 * old["exp_avg"])
    torch.testing.assert_close(new["exp_avg_sq"], 4 * old["exp_avg_sq"])
    torch.testing.assert_close(new["max_exp_avg_sq"], 4 * old["max_exp_avg_sq"])
    assert new["step"] == old["step"]


@every_optimizer
def test_a_rule_that_is_added_changed_and_removed(make):
    net = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    chain = [[], {"weight": WeightNorm()}, {"weight": LoRA(1)}, {"weight": SpectralNorm()}, []]
    if make is OPTIMIZERS["muon"]:
        chain[1:3] = [{"weight": Affine(scale=3.0)}]
    ps = [fp.parametrize(net, rules) for rules in chain]
    raw, state = ps[0].init(net)
    optimizer = make(fp.trainable(raw))
    for p, q in itertools.pairwise(ps):
        for _ in range(2):
            optimizer.zero_grad()
            p(raw, state)["weight"].sin().sum().backward()
            optimizer.step()
        goal = p(raw, state)["weight"].detach().clone()
        if isinstance(q.get("weight"), SpectralNorm):
            goal /= torch.linalg.matrix_norm(goal, 2)
        projects = isinstance(q.get("weight"), SpectralNorm)
        with pytest.warns(UserWarning, match="projected") if projects else nullcontext():
            raw, state = fp.move(p, q, raw, state, optimizer)
        torch.testing.assert_close(q(raw, state)["weight"], goal)
        held = {id(t) for group in optimizer.param_groups for t in group["params"]}
        assert held == {id(t) for t in fp.named(raw).values()}
        assert all(t.requires_grad for t in fp.named(raw).values())


def test_relora():
    """An adapter is merged into its weight and a new one begins; the optimizer goes on.

    Lialin et al., arXiv 2307.05695: its state of the factors is reset, the rest of it stays.
    """
    net = nn.Linear(5, 4, dtype=torch.float64)
    p, bare = fp.parametrize(net, {"weight": LoRA(2, alpha=6)}), fp.parametrize(net, [])
    torch.manual_seed(1)
    raw, state = p.init(net)
    optimizer = torch.optim.Adam(fp.trainable(raw), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def factors():
        A = (torch.rand(2, 5, dtype=torch.float64) - 0.5) * (2 / 5**0.5)
        return A.requires_grad_(), torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(1)
    (A, B), W = factors(), net.weight.detach().clone()
    bias = net.bias.detach().clone().requires_grad_()
    adam = torch.optim.Adam([A, B, bias], lr=0.05)
    for cycle in range(3):
        for i, (x, y) in enumerate(torch.randn(4, 2, 5, dtype=torch.float64)):
            values = p(raw, state)
            loss = (nn.functional.linear(x, values["weight"], values["bias"]) - y[:4]).square()
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
            for group in adam.param_groups:
                group["lr"] = 0.05 * 0.9 ** (4 * cycle + i)
            adam.zero_grad()
            ((W + 3 * B @ A) @ x + bias - y[:4]).square().sum().backward()
            adam.step()
            torch.testing.assert_close(p(raw, state)["weight"], W + 3 * B @ A)
            torch.testing.assert_close(raw["bias"], bias)
        kept = raw["bias"]
        torch.manual_seed(cycle)
        raw, state = fp.move(p, bare, raw, state, optimizer)
        raw, state = fp.move(bare, p, raw, state, optimizer)

        torch.manual_seed(cycle)
        W = (W + 3 * B @ A).detach()
        for tensor in (A, B):
            del adam.state[tensor]
        A, B = factors()
        adam.param_groups[0]["params"] = [A, B, bias]
        torch.testing.assert_close(state["weight"]["base"], W)
        assert torch.equal(raw["weight"]["A"], A)
        assert torch.equal(raw["weight"]["B"], B)
        assert raw["bias"] is kept
        assert {*optimizer.state} == {kept}
        assert optimizer.state[kept]["step"] == 4 * (cycle + 1)


def test_new_tensors_join_the_groups_of_those_that_they_replace():
    net = nn.Linear(5, 4)
    p, q = (fp.parametrize(net, {"weight": LoRA(rank)}) for rank in (1, 2))
    raw, state = p.init(net)
    groups = fp.groups(raw, p, net, lr_scale={"*.B": 16.0}).param_groups(lr=0.1)
    optimizer = torch.optim.SGD(groups)
    raw, state = fp.move(p, q, raw, state, optimizer)
    assert held(optimizer, "names") == ids(raw)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates == {"weight.A": 0.1, "weight.B": pytest.approx(1.6), "bias": 0.1}
    with pytest.raises(ValueError, match="'weight': expected a tensor that the .* its group may"):
        fp.move(q, fp.parametrize(net, []), raw, state, optimizer)
    assert held(optimizer, "names") == ids(raw)


def test_names_that_an_optimizer_has_of_its_tensors_are_kept_up():
    net = nn.Linear(5, 4)
    p, q = fp.parametrize(net, []), fp.parametrize(net, {"weight": WeightNorm()})
    raw, state = p.init(net)
    fp.trainable(raw)
    optimizer = torch.optim.SGD(fp.named(raw).items(), lr=0.1)
    raw, state = fp.move(p, q, raw, state, optimizer)
    assert held(optimizer, "param_names") == ids(raw)


def held(optimizer, names):
    """The tensors in an optimizer's groups, by the names that the groups have of them."""
    found = {}
    for group in optimizer.param_groups:
        found |= dict(zip(group[names], map(id, group["params"]), strict=True))
    return found


def ids(raw):
    return {name: id(tensor) for name, tensor in fp.named(raw).items()}


def test_weights_whose_rule_stays_are_left_alone():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    p = fp.parametrize(net, {"0.weight": Orthogonal()})
    q = fp.parametrize(net, {**p, "1.weight": WeightNorm()})
    raw, state = p.init(net)
    with torch.no_grad():
        raw["0.weight"].normal_()
    moved, new_state = fp.move(p, q, raw, state)
    assert moved["0.weight"] is raw["0.weight"]
    assert raw["0.weight"].ne(0).any()
    assert new_state["0.weight"] is state["0.weight"]
    assert q(moved, new_state).keys() == p(raw, state).keys()


def test_through_groups():
    """The optimizer of fp.groups is carried along, with kernels that it steps by views."""
    net = nn.Conv1d(2, 3, 2)
    p = fp.parametrize(net, {"weight": WeightNorm()})
    raw, state = p.init(net)
    groups = fp.groups(raw, p, net)
    optimizer = groups.optimizer()
    p(raw, state)["weight"].sin().sum().backward()
    optimizer.step()
    with torch.no_grad():
        raw["weight"]["direction"].mul_(5)
    before = p(raw, state)["weight"].detach()
    fp.move(p, fp.parametrize(net, {"weight": Chain(WeightNorm(), Affine(2.0))}), raw, state)
    raw, state = fp.move(p, p, raw, state, optimizer)
    torch.testing.assert_close(p(raw, state)["weight"], before / 2)
    with pytest.raises(ValueError, match="'weight': raw changes its shape, and the optimizer of"):
        fp.move(p, fp.parametrize(net, []), raw, state, optimizer)


def test_a_module_is_moved_whole():
    """Its raw and its state, in place: it goes on as the functional form does."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    p = fp.parametrize(net, {"0.weight": Orthogonal(), "1.weight": WeightNorm()})
    model, (raw, state) = fp.Parametrized(net, p), p.init(net)
    ours = torch.optim.Adam(model.parameters(), lr=0.05)
    theirs = torch.optim.Adam(fp.trainable(raw), lr=0.05)
    x = torch.randn(3, 4).double()
    for _ in range(3):
        for out, optimizer in (
            (model(x), ours),
            (torch.func.functional_call(net, p(raw, state), (x,)), theirs),
        ):
            optimizer.zero_grad()
            out.sin().sum().backward()
            optimizer.step()
        before = model.values()["0.weight"].detach().clone()
        base = model.get_buffer("state.0.weight.base")
        _, own = fp.move(p, p, *model.raw_and_state(), ours)
        raw, state = fp.move(p, p, raw, state, theirs)
        torch.testing.assert_close(model.values()["0.weight"], before)
        assert own["0.weight"]["base"] is base
        assert model.get_parameter("raw.0.weight").eq(0).all()
    for name, value in p(raw, state).items():
        torch.testing.assert_close(model.values()[name], value)


def test_frozen_and_untrained():
    values, p = rules(Frozen())
    raw, state = p.init(values)
    q = fp.parametrize(values, {"w": Orthogonal()})
    moved, _ = fp.move(p, q, raw, state)
    assert not moved["w"].requires_grad


def layers(*rules):
    """Three layers, and a parametrization for each of these rules."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    return net, *(fp.parametrize(net, own) for own in rules)


def learn(p, raw, state, optimizer, net, steps=2):
    losses = []
    for x in torch.linspace(-1, 1, 8 * steps).reshape(steps, 2, 4):
        optimizer.zero_grad()
        loss = torch.func.functional_call(net, p(raw, state), (x,)).sin().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("to", [{"0.weight": LoRA(4)}, {"1.weight": WeightNorm()}])
def test_the_order_of_an_optimizer_is_that_of_raw(to):
    """By which PyTorch's optimizers load their state."""
    net, p, q = layers([], to)
    raw, state = p.init(net)
    optimizer = torch.optim.Adam(fp.trainable(raw), lr=0.1)
    learn(p, raw, state, optimizer, net)
    raw, state = fp.move(p, q, raw, state, optimizer)
    (group,) = optimizer.param_groups
    assert [*map(id, group["params"])] == [*map(id, fp.trainable(raw))]
    learn(q, raw, state, optimizer, net)
    again = copy.deepcopy(raw)
    resumed = torch.optim.Adam(fp.trainable(again), lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert learn(q, raw, state, optimizer, net) == learn(q, again, state, resumed, net)


@pytest.mark.parametrize("transform", [Frozen(), LoRA(2)])
def test_a_weight_that_a_rule_froze_trains_when_the_rule_goes(transform):
    net, p, q = layers(
        {"1.weight": Frozen()}, [] if transform == Frozen() else {"1.weight": LoRA(2)}
    )
    raw, state = p.init(net)
    optimizer = torch.optim.Adam(fp.trainable(raw), lr=0.1)
    learn(p, raw, state, optimizer, net)
    before = p(raw, state)["1.weight"].clone()
    raw, state = fp.move(p, q, raw, state, optimizer)
    torch.testing.assert_close(q(raw, state)["1.weight"], before)
    (group,) = optimizer.param_groups
    assert [*map(id, group["params"])] == [*map(id, fp.trainable(raw))]
    learn(q, raw, state, optimizer, net)
    assert (q(raw, state)["1.weight"] - before).abs().max() > 1e-3
    groups = fp.groups(p.init(net)[0], p, net)
    for given in (groups.optimizer(), torch.optim.SGD(groups.param_groups(lr=0.1))):
        raw, state = p.init(net)
        with pytest.raises(ValueError, match="'1.weight.*make .* anew"):
            fp.move(p, q, raw, state, given)


def test_an_adapter_of_a_frozen_weight_trains():
    net, p, q = layers([], {"1.weight": LoRA(2)})
    raw, state = p.init(net)
    trained = [fp.trainable(raw)[0], fp.trainable(raw)[2]]
    raw["1.weight"].requires_grad_(False)
    for optimizer in (None, torch.optim.SGD(trained, lr=0.1)):
        moved, _ = fp.move(p, q, raw, state, optimizer)
        assert all(tensor.requires_grad for tensor in moved["1.weight"].values())
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, fp.trainable(moved))]


def test_a_frozen_weight_leaves_the_groups_with_its_tensor():
    """It may be in the groups of an optimizer, which passes over it."""
    net, p, q = layers([], {"1.weight": WeightNorm()})
    raw, state = p.init(net)
    optimizer = torch.optim.SGD(fp.trainable(raw), lr=0.1)
    raw["1.weight"].requires_grad_(False)
    raw, state = fp.move(p, q, raw, state, optimizer)
    (group,) = optimizer.param_groups
    assert [*map(id, group["params"])] == [*map(id, fp.named(raw).values())]
    assert not any(tensor.requires_grad for tensor in raw["1.weight"].values())


def test_a_tensor_of_another_kind_is_not_left_in_its_group():
    net, p, q = layers([], {"1.weight": Orthogonal()})
    nn.init.orthogonal_(net[1].weight)
    raw, state = p.init(net)
    groups = fp.groups(raw, p, net)
    before = copy.deepcopy(raw)
    for optimizer in (groups.optimizer(), torch.optim.SGD(groups.param_groups(lr=0.1))):
        with pytest.raises(ValueError, match="'1.weight': .* as 'weight', .* it is 'relative'"):
            fp.move(p, q, raw, state, optimizer)
        torch.testing.assert_close(raw, before, rtol=0, atol=0)
    fp.move(p, q, raw, state, torch.optim.SGD(fp.trainable(raw)))


def test_values_that_a_move_projects_are_said():
    net, p, q = layers([], {"0.weight": Orthogonal(), "1.weight": Symmetric()})
    message = r"'0.weight' by up to .*, to Orthogonal\(.*; '1.weight' by up to .* Symmetric"
    with pytest.warns(UserWarning, match=message) as found:
        fp.move(p, q, *p.init(net))
    assert found[0].filename == __file__


def test_what_cannot_be_moved():
    values, p = rules(Orthogonal())
    raw, state, optimizer = trained(p, values, OPTIMIZERS["adam"])
    stranger = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="'w': expected an optimizer that has this tensor of raw"):
        fp.move(p, p, raw, state, stranger)
    adagrad = torch.optim.Adagrad(fp.trainable(raw))
    with pytest.raises(ValueError, match="'w': expected moments exp_avg, .*; got 'sum' of Adagrad"):
        fp.move(p, p, raw, state, adagrad)
    for pair in [(p, {"w": Orthogonal()}), (nn.Linear(1, 1), p)]:
        with pytest.raises(TypeError, match=r"p: expected a parametrization, in fp.move"):
            fp.move(*pair, raw, state)
    with pytest.raises(ValueError, match="'w': expected parametrizations of the same weights"):
        fp.move(p, fp.parametrize({"v": values["w"]}, []), raw, state, optimizer)
    negative = fp.parametrize(values, {"w": Positive()})
    before = copy.deepcopy(raw)
    with pytest.raises(ValueError, match="'w': Positive.* expects every entry"):
        fp.move(p, negative, raw, state, optimizer)
    assert torch.equal(raw["w"], before["w"])


def test_squares_keep_steps_short_where_a_move_mixes_entries():
    """Of a symmetric problem half of the gradient is 0 to rounding, and so are its squares."""
    S = torch.randn(12, 12, dtype=torch.float64)
    values = {"w": torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64)).Q}
    p = fp.parametrize(values, {"w": Orthogonal("cayley")})
    raw, state = p.init(values)
    optimizer = torch.optim.Adam(fp.trainable(raw), lr=0.01)
    lengths = []
    for _ in range(30):
        optimizer.zero_grad()
        W = p(raw, state)["w"]
        (W.mT @ (S @ S.mT) @ W).trace().backward()
        optimizer.step()
        lengths.append(raw["w"].abs().max().item())
        raw, state = fp.move(p, p, raw, state, optimizer)
    assert max(lengths) < 0.02
    W = p(raw, state)["w"]
    assert (W.mT @ (S @ S.mT) @ W).trace() < 0.5 * (values["w"].mT @ S @ S.mT @ values["w"]).trace()


def test_squares_of_complex_raw_and_of_none():
    start = torch.linalg.qr(torch.randn(4, 2, dtype=torch.complex128)).Q
    p = fp.parametrize({"w": start}, {"w": Stiefel()})
    raw, state = p.init({"w": start})
    optimizer = torch.optim.Adam(fp.trainable(raw), lr=0.01)
    for rate in (0.0, 1.0):  # no gradient at all, and a usual one
        optimizer.zero_grad()
        (rate * p(raw, state)["w"].real.sum()).backward()
        optimizer.step()
        raw, state = fp.move(p, p, raw, state, optimizer)
        assert optimizer.state[raw["w"]]["exp_avg_sq"].isfinite().all()
    assert optimizer.state[raw["w"]]["exp_avg_sq"].abs().max() > 0
