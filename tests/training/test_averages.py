"""Averages keep constraints: of a run, of several runs, and by torch's own AveragedModel."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils._pytree import tree_map

import funcparam as fp
from funcparam.transforms import (
    AlmostOrthogonal,
    Chain,
    LoRA,
    Mask,
    Orthogonal,
    OrthogonalConv,
    Positive,
    SpectralCap,
    SpectralNorm,
    Stiefel,
    UnitNorm,
    WeightNorm,
)
from tests.networks import Tied
from tests.parametrization.test_shared import turned

close = torch.testing.assert_close
ORTHOGONAL = {"0.weight": Orthogonal()}


def network():
    layers = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 4)
    return nn.Sequential(*layers).double()


RULES = {
    "0.weight": Orthogonal(),
    "1.weight": Positive(),
    "2.weight": SpectralNorm(),
    "3.weight": UnitNorm(dim=None, radius=None),
    "4.weight": Chain(AlmostOrthogonal(0.1), SpectralNorm()),
}


def step(net, optimizer, target):
    optimizer.zero_grad()
    (net(torch.randn(9, 6).double()) - target).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("ema", [False, True], ids=["swa", "ema"])
def test_averaged_model(use_buffers, ema):
    net = network()
    model = fp.Parametrized(net, fp.parametrize(net, RULES))
    multi = get_ema_multi_avg_fn(0.8) if ema else None
    averaged = AveragedModel(model, multi_avg_fn=multi, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(12):
        step(model, optimizer, 3.0)
        averaged.update_parameters(model)
        model.rebase()
    before = averaged.module.violation()
    assert max(before.values()) > 1e-3  # whatever is averaged, or taken over
    averaged.module.refresh()
    assert max(averaged.module.violation().values()) < 1e-9
    plain = averaged.module.eval().fold()
    x = torch.randn(3, 6).double()
    close(plain(x), averaged(x))
    update_bn([torch.randn(9, 6).double()], averaged)
    assert max(averaged.module.violation().values()) < 1e-9


def test_refresh_of_a_shell_is_in_place():
    net = network()
    model = fp.Parametrized(net, fp.parametrize(net, RULES))
    u = model.get_buffer("state.2.weight.u")
    with torch.no_grad():
        model.get_parameter("raw.2.weight").normal_()
    model.refresh()
    assert model.get_buffer("state.2.weight.u") is u
    assert model.violation()["2.weight"] < 1e-9


def run(seed, rules=ORTHOGONAL, steps=5, **options):
    """A run from one start, by batches of its own; without moves of base points."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double()
    p = fp.parametrize(net, rules)
    raw, state = p.init(net)
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(fp.trainable(raw), **{"lr": 0.01, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(9, 6).double()
        (functional_call(net, p(raw, state), (x,)) - 2).square().sum().backward()
        optimizer.step()
        state = p.update(raw, state)
    return p, (raw, state)


def runs(rules=ORTHOGONAL, count=3):
    made = [run(seed, rules) for seed in range(count)]
    return made[0][0], [point for _, point in made]


def test_raw():
    p, points = runs()
    raw, state = fp.average(points, p)
    close(raw["0.weight"], sum(point[0]["0.weight"] for point in points) / 3)
    close(raw["1.bias"], sum(point[0]["1.bias"] for point in points) / 3)
    assert not any(tensor.requires_grad for tensor in fp.named(raw).values())
    raw["1.bias"].zero_()
    state["0.weight"]["base"].zero_()  # nothing is shared
    assert p.violation(p(*points[0]))["0.weight"] < 1e-9


def test_singular_vectors_are_those_of_the_average():
    p, points = runs({"*.weight": SpectralNorm()})
    raw, state = fp.average(points, p)
    assert max(p.violation(p(raw, state)).values()) < 1e-12
    for name, own in state.items():
        sigma = own["u"] @ raw[name] @ own["v"]
        close(sigma, torch.linalg.matrix_norm(raw[name], 2))


def test_values_are_those_of_the_projected_mean():
    p, points = runs()
    raw, state = fp.average(points, p, "values", weights=[1, 1, 2])
    mean = sum(w * p(*point)["0.weight"] for w, point in zip((1, 1, 2), points, strict=True)) / 4
    U, _, Vh = torch.linalg.svd(mean)
    close(p(raw, state)["0.weight"], (U @ Vh).detach())


def test_karcher():
    p, points = runs({"0.weight": Orthogonal("cayley"), "1.weight": Stiefel()})
    found = p(*fp.average(points, p, "karcher"))
    assert max(p.violation(found).values()) < 1e-12
    chordal = p(*fp.average(points, p, "values"))
    for name in p:
        assert 1e-9 < (found[name] - chordal[name]).abs().max() < 0.1
    close(found["1.bias"], chordal["1.bias"])


@pytest.mark.parametrize("how", ["values", "karcher"])
def test_points_with_bases_of_their_own(how):
    p, points = runs()
    moved = [points[0], *(p.rebase(*point) for point in points[1:])]
    close(p(*fp.average(moved, p, how)), p(*fp.average(points, p, how)))
    message = (
        "'0.weight': expected points that share what raw is relative to; points.1. has another"
    )
    with pytest.raises(ValueError, match=message):
        fp.average(moved, p)


def test_a_running_average():
    """EMA by hand: of the average and the point, whatever moves between."""
    p, (raw, state) = run(0, steps=0)
    ema = raw, state
    value, bias = p(raw, state)["0.weight"], raw["1.bias"].detach().clone()
    for seed in range(1, 5):
        p, point = run(seed)
        if seed == 3:
            point = p.rebase(*point)
        ema = fp.average([ema, point], p, "values", [0.9, 0.1])
        value = p.project({**p(raw, state), "0.weight": 0.9 * value + 0.1 * p(*point)["0.weight"]})
        value = value["0.weight"]
        bias = 0.9 * bias + 0.1 * point[0]["1.bias"]
    close(p(*ema)["0.weight"], value.detach())
    close(ema[0]["1.bias"], bias.detach())


def test_an_adapter_is_merged():
    p, points = runs({"0.weight": LoRA(2)})
    with pytest.raises(ValueError, match="has another 'base' in state"):
        fp.average([points[0], p.init(p(*points[1]))], p)
    raw, state = fp.average(points, p, "values")
    mean = sum(p(*point)["0.weight"] for point in points).detach() / 3
    close(state["0.weight"]["base"], mean)
    close(p(raw, state)["0.weight"], mean)


def test_constraints_that_lie_in_state():
    values = {"w": torch.randn(4, 3).double(), "v": torch.randn(4, 3).double().tril()}
    p = fp.parametrize(values, {"w": SpectralCap(1.0), "v": Mask()})
    raw, state = p.init(values)
    state["w"]["cap"] = torch.tensor(3.0).double()
    other = {"w": 4 * raw["w"], "v": raw["v"].flip(0) + 1}
    new, kept = fp.average([(raw, state), (other, state)], p, "values")
    assert kept["w"]["cap"] == 3
    assert torch.equal(kept["v"]["mask"], state["v"]["mask"])
    assert torch.linalg.svdvals(p(new, kept)["w"])[0] > 1.01
    assert max(p.violation(p(new, kept), kept).values()) < 1e-12
    second = copy.deepcopy(state)
    second["v"]["mask"].logical_not_()
    with pytest.raises(ValueError, match="'v': expected points of one constraint; what of it lies"):
        fp.average([(raw, state), (raw, second)], p, "values")
    with pytest.raises(ValueError, match="'v': expected points that share .* has another 'mask'"):
        fp.average([(raw, state), (raw, second)], p)
    q = fp.parametrize(values, {"w": AlmostOrthogonal(0.2)})
    raw, state = q.init(values)
    state["w"]["lam"] = torch.tensor(0.9).double()
    raw["w"]["S"].fill_(1.5)
    with pytest.raises(ValueError, match="'w': state holds another constraint than AlmostOrtho"):
        fp.average([(raw, state)], q, "values")


def test_every_kind_of_tree_and_leaf():
    tree = {"a": [torch.rand(2, 2), torch.arange(3)], "b": (torch.rand(3).bfloat16(),)}
    p = fp.parametrize(tree, {"a.0": Positive(), "b.0": WeightNorm()})
    raw, state = p.init(tree)
    for how in ("raw", "values"):
        found = p(*fp.average([(raw, state)] * 3, p, how))
        close(found, p(raw, state), rtol=1e-2, atol=1e-3)
        assert found["b"][0].dtype == torch.bfloat16
    other = {**raw, "a.1": raw["a.1"] + 1}
    with pytest.raises(ValueError, match="'a.1': expected equal torch.int64 in all points"):
        fp.average([(raw, state), (other, state)], p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_in_single_and_half_precision(dtype):
    values = {"w": torch.randn(8, 8).to(dtype), "v": torch.randn(8, 8).to(dtype)}
    p = fp.parametrize(values, {"w": Orthogonal(), "v": SpectralNorm()})
    raw, state = p.init(values)
    point = (
        {name: tensor + 0.1 * torch.randn(8, 8).to(dtype) for name, tensor in raw.items()},
        state,
    )
    for how in ("raw", "values"):
        found = fp.average([(raw, state), point], p, how)
        assert max(p.violation(p(*found), found[1]).values()) < 4 * torch.finfo(dtype).eps
    with pytest.raises(ValueError, match="'w': expected points that share .* another 'base'"):
        fp.average([(raw, state), p.rebase(*point)], p)


def test_ties_and_values_that_depend_on_others():
    tied = Tied()
    q = fp.parametrize(tied, {"encoder.weight": Orthogonal()})
    raw, state = q.init(tied)
    for how in ("raw", "values", "karcher"):
        found = q(*fp.average([(raw, state)] * 2, q, how))
        assert found["encoder.weight"] is found["decoder.weight"]
    net, p, raw, state = turned()
    other = {**raw, "R": raw["R"] + 0.1 * torch.randn_like(raw["R"])}
    for how in ("raw", "values"):
        mean, kept = fp.average([(raw, state), (other, state)], p, how)
        x = torch.randn(5, 3).double()
        if how == "raw":  # the layers are still turned by one rotation
            close(functional_call(net, p(mean, kept), (x,)), net(x))
        assert p.violation(p(mean, kept), kept)["R"] < 1e-12


def test_refresh_of_a_stack():
    net = network()
    p = fp.parametrize(net, RULES)
    raw, state = p.init(net)
    raws, states = tree_map(lambda t: torch.stack([t, t + 0.1 * torch.randn_like(t)]), (raw, state))
    found = vmap(p.refresh)(raws, states)
    for i in range(2):
        own = [tree_map(lambda t, i=i: t[i], tree) for tree in (raws, states, found)]
        close(p(own[0], own[2]), p(own[0], p.refresh(own[0], own[1])))


def test_a_kernel():
    net = nn.Conv2d(3, 3, 3)
    p = fp.parametrize(net, {"weight": OrthogonalConv()})
    raw, state = p.init(net)
    state["weight"] = {
        key: own + 0.01 * torch.randn_like(own) for key, own in state["weight"].items()
    }
    assert p.violation(p(raw, state))["weight"] > 1e-3
    assert p.violation(p(raw, p.refresh(raw, state)))["weight"] < 1e-5


def test_means_of_a_soup_in_a_shell():
    p, points = runs()
    raw, state = fp.average(points, p, "karcher")
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model = fp.Parametrized(net, p, raw=raw, state=state)
    again, own = fp.average([model.raw_and_state()] * 2, p)
    close(p(again, own), model.values())


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([], {}, "points: expected at least one pair of raw and state; got none"),
        (["x"], {}, r"points\[0\]: expected \(raw, state\); got str"),
        ([({}, {})], {}, r"points\[0\]: raw: missing '0.weight'"),
        (None, {"how": "mean"}, "how: expected one of raw, values, karcher; got 'mean'"),
        (None, {"weights": [1.0]}, r"weights: expected 3 numbers, not negative .*; got \[1.0\]"),
        (None, {"weights": [1, 2, -1]}, "weights: expected 3 numbers, not negative and not all 0"),
        (None, {"weights": [0, 0, 0]}, "weights: expected 3 numbers, not negative and not all 0"),
    ],
)
def test_bad_input(points, options, message):
    p, many = runs(count=3)
    with pytest.raises((TypeError, ValueError), match=message):
        fp.average(many if points is None else points, p, **options)


def test_what_has_no_karcher_mean():
    p, points = runs({"0.weight": Orthogonal(), "1.weight": WeightNorm()})
    with pytest.raises(
        NotImplementedError, match=r"'1.weight': WeightNorm\(dim=0\) has no Karcher"
    ):
        fp.average(points, p, "karcher")
    turned, rest = p.split("0.*")
    parts = [
        fp.average([tuple(map(part.of, point)) for point in points], part, how)
        for part, how in ((turned, "karcher"), (rest, "raw"))
    ]
    raw, state = parts[0][0] | parts[1][0], parts[0][1] | parts[1][1]
    assert p.violation(p(raw, state))["0.weight"] < 1e-12
    opposite = {"w": torch.eye(4)}, {"w": -torch.eye(4)}
    q = fp.parametrize(opposite[0], {"w": Orthogonal()})
    with pytest.raises(
        ValueError, match="'w': expected matrices that are less than a quarter turn"
    ):
        fp.average([q.init(value) for value in opposite], q, "karcher")
