"""The dictionary level."""

import copy
import pickle
from dataclasses import dataclass
from typing import NamedTuple, final

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import funcparam as fp
from funcparam.transforms import (
    FixedRank,
    Frozen,
    Interval,
    LoRA,
    Mask,
    Orthogonal,
    Positive,
    SpectralNorm,
    Symmetric,
    Transform,
    WeightNorm,
)
from tests.networks import Classifier, Tied, loss_of, mixed, mlp


def noisy(tree):
    return tree_map(lambda t: t + 0.1 * torch.randn_like(t), tree)


def equal(a, b):
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(x is y or torch.equal(x, y) for x, y in pairs)


# The map


def test_values_are_an_ordinary_dict_with_the_networks_names():
    net, p = mixed()
    params = p(*p.init(net))
    assert type(params) is dict
    assert params.keys() == dict(net.named_parameters()).keys()


def test_init_keeps_feasible_weights_and_projects_others():
    net, p = mixed()
    raw, state = p.init(net)
    params = p(raw, state)
    for name, weight in net.named_parameters():
        if not isinstance(p.get(name), Orthogonal | SpectralNorm):
            torch.testing.assert_close(params[name], weight)
    again = fp.fold(net, params)
    torch.testing.assert_close(p(*p.init(again)), params, rtol=1e-12, atol=1e-13)


def test_init_shares_nothing_with_the_network():
    net, p = mixed()
    before = copy.deepcopy(net.state_dict())
    for tree in p.init(net):
        for tensor in tree_leaves(tree):
            assert not tensor.requires_grad
            tensor.add_(1)
    assert equal(before, net.state_dict())


def test_right_inverse_is_differentiable_and_inverts():
    tree = {"w": torch.rand(3, requires_grad=True), "b": torch.rand(2)}
    p = fp.parametrize(tree, {"w": Positive()})
    raw, state = p.right_inverse(tree)
    (g,) = torch.autograd.grad(raw["w"].sum(), tree["w"])
    torch.testing.assert_close(g, 1 / (1 - torch.exp(-tree["w"].detach())))
    torch.testing.assert_close(p(raw, state), tree)


def test_state_may_be_left_out_where_there_is_none():
    net = mlp()
    p = fp.parametrize(net, {"*.weight": WeightNorm()})
    raw, state = p.init(net)
    assert state == {}
    assert equal(p(raw), p(raw, state))


def test_update_advances_power_iteration_only():
    net, p = mixed()
    raw, state = p.init(net)
    raw = noisy(raw)
    new = p.update(raw, state)
    assert new["0.weight"]["base"] is state["0.weight"]["base"]
    assert not torch.equal(new["4.weight"]["u"], state["4.weight"]["u"])
    for _ in range(300):
        new = p.update(raw, new)
    assert p.violation(p(raw, new))["4.weight"] < 1e-9


def test_advance_is_update_and_evaluation():
    net, p = mixed()
    raw, state = p.init(net)
    raw = noisy(raw)
    values, new = p.advance(raw, state)
    assert equal(new, p.update(raw, state))
    assert equal(values, p(raw, new))
    with pytest.raises(ValueError, match="missing"):
        p.advance({}, state)


def test_rebase_keeps_the_values_and_moves_the_base():
    net, p = mixed()
    raw, state = p.init(net)
    raw = noisy(raw)
    new_raw, new_state = p.rebase(raw, state)
    torch.testing.assert_close(p(new_raw, new_state), p(raw, state))
    assert new_raw["0.weight"].count_nonzero() == 0
    assert equal(new_raw["2.weight"]["magnitude"], raw["2.weight"]["magnitude"])


@final
@dataclass(frozen=True)
class Centred(Transform):
    """A transform as users write it: `update` and `rebase` detach nothing."""

    def stacks(self, kind):
        return 4, 9

    def forward(self, raw, state):
        return raw - state["mean"] + state["base"]

    def right_inverse(self, value, *, generator=None):
        return torch.zeros_like(value), {"mean": torch.zeros_like(value), "base": value}

    def update(self, raw, state):
        return {"mean": 0.9 * state["mean"] + 0.1 * raw, "base": state["base"]}

    def rebase(self, raw, state):
        return torch.zeros_like(raw), {**state, "base": state["base"] + raw}

    def violation(self, value, state):
        return value.new_zeros(())


@pytest.fixture(params=[1, 4], ids=["alone", "stacked"])
def centred(request):
    tree = {f"w{i}": torch.rand(2) for i in range(request.param)}
    p = fp.parametrize(tree, {"*": Centred()})
    raw, state = p.init(tree)
    return p, noisy(raw), state


STEPS = [
    lambda p, raw, state: p.update(raw, state),
    lambda p, raw, state: p.advance(raw, state)[1],
    lambda p, raw, state: p.rebase(raw, state)[1],
]


@pytest.mark.parametrize("step", STEPS, ids=["update", "advance", "rebase"])
def test_steps_outside_of_training_carry_no_gradients(centred, step):
    p, raw, state = centred

    def total(raw, state):
        return sum(t.sum() for own in step(p, raw, state).values() for t in own.values())

    fp.trainable(raw)
    for _ in range(2):  # a second backward would need the graph of the first
        p(raw, state)["w0"].square().sum().backward()
        state = step(p, raw, state)
    assert not any(t.requires_grad for own in state.values() for t in own.values())
    with torch.no_grad():
        raw = noisy(raw)
    assert all(t.count_nonzero() == 0 for t in grad(total)(raw, state).values())
    second = grad(lambda raw: sum(t.sum() for t in grad(total)(raw, state).values()))(raw)
    assert all(t.count_nonzero() == 0 for t in second.values())
    _, tangent = jvp(lambda raw: total(raw, state), (raw,), (raw,))
    assert tangent == 0


def test_rebase_keeps_what_is_trained():
    net = mlp()
    p = fp.parametrize(net, {"0.weight": Orthogonal(), "2.weight": LoRA(rank=2)})
    raw, state = p.init(net)
    raw = noisy(raw)
    fp.trainable(raw)
    raw["0.bias"].requires_grad_(requires_grad=False)
    expected = p(raw, state)
    for _ in range(2):
        new_raw, state = p.rebase(raw, state)
        assert [name for name, own in raw.items() if new_raw[name] is not own] == ["0.weight"]
        assert new_raw["0.weight"].is_leaf
        assert new_raw["0.weight"].requires_grad
        raw = new_raw
        torch.testing.assert_close(p(raw, state), expected)
        p(raw, state)["0.weight"].square().sum().backward()  # no graph of before goes through it
    raw["0.weight"].requires_grad_(requires_grad=False)
    assert not p.rebase(raw, state)[0]["0.weight"].requires_grad


def test_rebase_of_named_raw_keeps_what_does_not_move():
    value = torch.randn(3, 3)
    p = fp.parametrize({"w": value}, {"w": FixedRank(rank=2)})
    raw, state = p.init({"w": value})
    fp.trainable(raw)
    raw["w"]["U"].requires_grad_(requires_grad=False)
    new = p.rebase(raw, state)[0]["w"]
    assert [key for key, old in raw["w"].items() if new[key] is old] == ["S"]
    assert [key for key, t in new.items() if t.requires_grad] == ["S", "V"]
    stack = tree_map(lambda t: torch.stack([t, t]), (raw, state))
    assert vmap(p.rebase)(*stack)[0]["w"]["U"].count_nonzero() == 0


def test_log_abs_det_jacobian_adds_up_and_names_who_has_none():
    tree = {"a": torch.rand(3), "b": torch.rand(2) / 2, "c": torch.rand(4)}
    p = fp.parametrize(tree, {"a": Positive(), "b": Interval(0, 1)})
    raw, state = p.init(tree)
    parts = [p[n].log_abs_det_jacobian(raw[n], state.get(n, {})) for n in p]
    torch.testing.assert_close(p.log_abs_det_jacobian(raw, state), sum(parts))
    q = fp.parametrize(tree, {"a": Positive(), "c": WeightNorm()})
    with pytest.raises(NotImplementedError, match="'c': WeightNorm"):
        q.log_abs_det_jacobian(*q.init(tree))


def test_violation_by_name():
    net, p = mixed()
    assert p.violation(net)["0.weight"] > 0.1
    assert all(v < 1e-9 for v in p.violation(p(*p.init(net))).values())
    q = fp.parametrize(net, {"0.weight": Mask()})
    with pytest.raises(ValueError, match="'0.weight': Mask.* expects state with a 'mask'"):
        q.violation(net)
    assert q.violation(net, q.init(net)[1])["0.weight"] == 0


def test_bounds_and_ranks_sweep_through_state():
    tree = {"w": torch.full((3, 3), 0.25)}
    p = fp.parametrize(tree, {"w": Interval(0, 1)})
    raw, state = p.init(tree)
    highs = torch.tensor([1.0, 2.0, 4.0])
    swept = vmap(lambda high: p(raw, {"w": {**state["w"], "high": high}})["w"].mean())(highs)
    torch.testing.assert_close(swept, 0.25 * highs)
    q = fp.parametrize(tree, {"w": LoRA(rank=2)})
    raw, state = q.init(tree)
    raw["w"]["B"] = torch.randn(3, 2)
    scales = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    deltas = vmap(lambda s: q(raw, {"w": {**state["w"], "scale": s}})["w"])(scales) - tree["w"]
    assert [torch.linalg.matrix_rank(d, atol=1e-5).item() for d in deltas] == [0, 1, 2]


# Trees, ties, buffers


def test_a_tied_buffer_with_a_rule_is_no_plain_buffer():
    net = nn.BatchNorm1d(3)
    net.register_buffer("again", net.running_var)
    p = fp.parametrize(net, {"running_var": Positive()})
    assert p.buffers == ("running_mean", "num_batches_tracked")


class Pair(NamedTuple):
    left: torch.Tensor
    right: dict


def test_any_pytree():
    tree = {"layers": [torch.randn(3, 3), None], "pair": Pair(torch.rand(2), {"x": torch.ones(1)})}
    p = fp.parametrize(tree, {"layers.0": Symmetric(), "pair.left": Positive()})
    raw, state = p.init(tree)
    assert set(raw) == {"layers.0", "pair.left", "pair.right.x"}
    out = p(raw, state)
    assert isinstance(out["pair"], Pair)
    assert out["layers"][1] is None
    torch.testing.assert_close(out["pair"].left, tree["pair"].left)
    torch.testing.assert_close(out["layers"][0], out["layers"][0].mT)
    same = pickle.loads(pickle.dumps(p))
    assert same == p
    assert hash(same) == hash(p)
    assert equal(same(raw, state), out)


def test_any_pytree_compiled():
    tree = {"layers": [torch.randn(3, 3), None], "pair": Pair(torch.rand(2), {"x": torch.ones(1)})}
    p = fp.parametrize(tree, {"layers.0": Symmetric(), "pair.left": Positive()})
    raw, state = p.init(tree)
    compiled = torch.compile(p.__call__, fullgraph=True, backend="aot_eager")
    assert equal(compiled(raw, state), p(raw, state))


def test_non_tensor_leaves_and_colliding_names_are_refused():
    with pytest.raises(TypeError, match=r"'a\.1': expected a tensor; got float"):
        fp.parametrize({"a": [torch.ones(1), 2.0]}, {"a.0": Positive()})
    with pytest.raises(ValueError, match=r"'a\.b': expected one leaf of this name; got two"):
        fp.parametrize({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, {"a.b": Positive()})


def test_a_tied_buffer_is_picked_by_any_of_its_names():
    net = nn.ModuleList([nn.Module(), nn.Module()])
    for part in net:
        part.register_buffer("scale", torch.ones(3))
    net[1].scale = net[0].scale
    for name in ("0.scale", "1.scale"):
        p = fp.parametrize(net, {name: Positive()})
        assert list(p) == ["0.scale"]


def test_a_buffer_can_be_a_target():
    net = Classifier().eval()
    p = fp.parametrize(net, {"norm.running_var": Positive()})
    raw, state = p.init(net)
    params = p(raw, state)
    assert "norm.running_var" in params
    assert "norm.running_mean" not in params
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(functional_call(net, params, (x,)), net(x))


def test_integers_pass_through():
    tree = {"w": torch.rand(2), "steps": torch.tensor(3)}
    p = fp.parametrize(tree, {"w": Positive()})
    assert p(*p.init(tree))["steps"] == 3


def test_ties_of_a_plain_dictionary():
    shared = torch.rand(2)
    tree = {"a": shared, "b": shared, "c": torch.rand(2)}
    p = fp.parametrize(tree, {"b": Positive()}, ties=True)
    raw, state = p.init(tree)
    assert set(raw) == {"a", "c"}
    out = p(raw, state)
    assert out["a"] is out["b"]
    with pytest.raises(ValueError, match="'a' and 'b' are tied .* two different tensors"):
        p.init({**tree, "b": torch.zeros(2)})
    assert equal(p.init({"b": shared, "c": tree["c"]}), (raw, state))
    with pytest.raises(ValueError, match=r"raw: 'b' is tied to 'a'; raw has it under that name"):
        p({"b": raw["a"], "c": raw["c"]}, state)


@pytest.mark.parametrize("nested", [False, True])
def test_one_initial_value_of_two_weights_is_no_tie(nested):
    zeros = torch.zeros(3)
    tree = {"a": [zeros], "b": [zeros]} if nested else {"a": zeros, "b": zeros}
    p = fp.parametrize(tree, [])
    raw, _ = p.init(tree)

    def loss(raw):
        a, b = tree_leaves(p(raw))
        return (a + 2 * b).sum()

    assert [t.tolist() for t in tree_leaves(grad(loss)(raw))] == [[1, 1, 1], [2, 2, 2]]
    tied = fp.parametrize(tree, [], ties=True)
    (found,) = tree_leaves(grad(lambda raw: sum(tree_leaves(tied(raw))).sum())(tied.init(tree)[0]))
    assert found.tolist() == [2, 2, 2]


def test_copies_of_a_tie_are_equal_where_both_have_nan():
    a = torch.tensor([1.0, float("nan")])
    tree = {"a": a, "b": a, "c": torch.rand(2)}
    p = fp.parametrize(tree, {"c": Positive()}, ties=True)
    raw, _ = p.init({**tree, "b": a.clone()})
    torch.testing.assert_close(raw["a"], a, equal_nan=True)
    for other in (a.flip(0), a.nan_to_num(), a.double(), a[:1], a.to("meta")):
        with pytest.raises(ValueError, match="'a' and 'b' are tied .* two different tensors"):
            p.init({**tree, "b": other})


def test_state_beside_raw_of_another_precision():
    net, p = mixed(mlp(dtype=torch.float32))
    raw, state = p.init(net)
    low, _ = p.init(net.to(torch.bfloat16))
    exact = p(raw, state)
    for values, new in (p.advance(low, state), (p(low, state), p.update(low, state))):
        for name, value in values.items():
            assert value.dtype == torch.bfloat16
            torch.testing.assert_close(value.float(), exact[name], rtol=0.05, atol=0.05)
        assert {t.dtype for own in new.values() for t in own.values()} == {torch.float32}
    double = {n: own.double() if isinstance(own, torch.Tensor) else own for n, own in raw.items()}
    for values, new in (p.advance(double, state), (p(double, state), p.update(double, state))):
        for name in ("0.weight", "4.weight"):
            assert values[name].dtype == torch.float64
            torch.testing.assert_close(values[name].float(), exact[name])
        assert {t.dtype for own in new.values() for t in own.values()} == {torch.float32}


# The mapping


def test_it_is_an_immutable_mapping():
    _, p = mixed()
    assert list(p) == ["0.weight", "2.weight", "4.weight", "4.bias"]
    assert len(p) == 4
    assert p["2.weight"] == WeightNorm()
    assert "0.bias" not in p
    assert p == mixed()[1]
    assert hash(p) == hash(mixed()[1])
    assert copy.deepcopy(p) is p
    with pytest.raises(AttributeError):
        p.entries = ()
    with pytest.raises(TypeError):
        p["0.weight"] = Mask()


def test_it_prints_as_a_table():
    net = Tied()
    p = fp.parametrize(net, {"encoder.weight": Orthogonal("cayley"), "encoder.bias": Positive()})
    lines = repr(p).splitlines()
    assert lines[0].split() == ["name", "transform", "value", "raw", "state"]
    assert "encoder.weight = decoder.weight" in lines[2]
    assert "base: (5, 5)" in lines[2]
    assert "float32 (5, 5)" in lines[2]


# torch.func


def test_grad_vmap_jvp_hessian_through_the_network():
    net, p = mixed()
    raw, state = p.init(net)
    raw = noisy(raw)
    x, y = torch.randn(5, 6).double(), torch.randn(5, 6).double()
    loss = loss_of(net, p)
    g = grad(loss)(raw, state, x, y)
    flat, spec = tree_flatten(raw)
    direction = [torch.randn_like(t) for t in flat]
    step = 1e-6

    def at(k):
        moved = [t + k * step * d for t, d in zip(flat, direction, strict=True)]
        return loss(tree_unflatten(moved, spec), state, x, y)

    finite = (at(1) - at(-1)) / (2 * step)
    slope = sum((a * b).sum() for a, b in zip(tree_leaves(g), direction, strict=True))
    torch.testing.assert_close(slope, finite, rtol=1e-6, atol=1e-8)
    _, forward = jvp(lambda r: loss(r, state, x, y), (raw,), (tree_unflatten(direction, spec),))
    torch.testing.assert_close(forward, slope)
    per_sample = vmap(grad(loss), in_dims=(None, None, 0, 0))(raw, state, x, y)
    mean = tree_map(lambda t: t.mean(0), per_sample)
    torch.testing.assert_close(tree_leaves(mean), tree_leaves(g))

    def of_bias(b):
        return loss({**raw, "2.bias": b}, state, x, y)

    H = hessian(of_bias)(raw["2.bias"])
    torch.testing.assert_close(H, H.mT)


def test_ensembles_by_vmap():
    nets = [mlp() for _ in range(3)]
    _, p = mixed(nets[0])
    pairs = [p.init(net) for net in nets]
    raws, states = (
        tree_map(lambda *ts: torch.stack(ts), *trees) for trees in zip(*pairs, strict=True)
    )
    x = torch.randn(4, 6).double()
    out = vmap(lambda r, s: functional_call(nets[0], p(r, s), (x,)))(raws, states)
    loop = [functional_call(nets[0], p(*pair), (x,)) for pair in pairs]
    torch.testing.assert_close(out, torch.stack(loop))
    stacked, _ = torch.func.stack_module_state(nets)
    raws2, states2 = vmap(p.init)(stacked)
    torch.testing.assert_close(raws2["2.weight"], raws["2.weight"])
    torch.testing.assert_close(vmap(p)(raws2, states2), vmap(p)(raws, states))


def test_meta_networks_have_meta_raw():
    net, p = mixed(mlp().to("meta"))
    raw, state = p.init(net)
    assert all(t.is_meta for t in tree_leaves((raw, state, p(raw, state))))


# The boundary


def wrong(change):
    net, p = mixed()
    raw, state = p.init(net)
    change(raw, state)
    return lambda: p(raw, state)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda r, s: r.update(extra=torch.ones(1)), ValueError, "raw: unknown name 'extra'"),
        (lambda r, s: r.pop("2.weight"), ValueError, "raw: missing '2.weight'; got a dict with"),
        (lambda r, s: r.pop("0.bias"), ValueError, "raw: missing '0.bias'"),
        (
            lambda r, s: r.update({"0.bias": torch.ones(7)}),
            ValueError,
            r"raw\['0.bias'\]: expected float64 \(6,\); got float32 \(7,\)",
        ),
        (
            lambda r, s: r.update({"0.weight": torch.ones(6, 6).to(torch.complex64)}),
            ValueError,
            r"raw\['0.weight'\]: expected float64 \(6, 6\); got complex64",
        ),
        (
            lambda r, s: r.update({"0.weight": torch.ones(6, 6, dtype=torch.int64)}),
            ValueError,
            r"raw\['0.weight'\]: expected float64 \(6, 6\); got int64",
        ),
        (
            lambda r, s: r.update({"0.weight": torch.ones(3, 6, 6)}),
            ValueError,
            r"raw\['0.weight'\]: .*If the first dimension is a stack, use torch.func.vmap",
        ),
        (
            lambda r, s: r.update({"2.weight": torch.ones(6, 6)}),
            TypeError,
            r"raw\['2.weight'\]: expected a dict with 'magnitude', 'direction'; got a tensor of "
            r"shape \(6, 6\)\. If it is a value, p.init or p.right_inverse makes it raw",
        ),
        (
            lambda r, s: r["2.weight"].pop("magnitude"),
            ValueError,
            r"raw\['2.weight'\]: expected the names \['magnitude', 'direction'\]; got \['dir",
        ),
        (
            lambda r, s: r["2.weight"].update(magnitude=torch.ones(6)),
            ValueError,
            r"raw\['2.weight'\]\['magnitude'\]: expected float64 \(6, 1\); got float32 \(6,\)",
        ),
        (lambda r, s: r.update({"0.bias": 3.0}), TypeError, r"raw\['0.bias'\]: .*got float"),
        (lambda r, s: r.update({"0.weight": {}}), TypeError, r"raw\['0.weight'\]: .*got a dict"),
        (
            lambda r, s: s.pop("0.weight"),
            ValueError,
            r"state: missing '0.weight' with 'base'\. raw, state = p.init",
        ),
        (lambda r, s: s.update(nope={}), ValueError, r"state: unknown names \['nope'\]"),
        (lambda r, s: s.update({"0.bias": {}}), ValueError, r"state: unknown names \['0.bias'\]"),
        (
            lambda r, s: s["4.weight"].update(u=torch.ones(2)),
            ValueError,
            r"state\['4.weight'\]\['u'\]: expected float64 \(6,\); got float32 \(2,\)",
        ),
        (lambda r, s: s.update({"4.weight": 3}), TypeError, r"state\['4.weight'\]: .*got int"),
    ],
)
def test_raw_and_state_are_checked_before_anything_is_computed(change, error, match, monkeypatch):
    call = wrong(change)
    monkeypatch.setattr(WeightNorm, "forward", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(Orthogonal, "forward", lambda *_: pytest.fail("computed"))
    with pytest.raises(error, match=match):
        call()


def test_modules_where_dictionaries_are_due():
    net, p = mixed()
    raw, state = p.init(net)
    with pytest.raises(TypeError, match=r"raw: expected a dict; got .*Sequential\. raw, state = p"):
        p(net, state)
    with pytest.raises(TypeError, match=r"state: expected a dict; got .*Sequential"):
        p(raw, net)
    with pytest.raises(ValueError, match="state: missing '0.weight'"):
        p(raw)


def test_another_networks_weights_are_refused():
    net, p = mixed()
    with pytest.raises(ValueError, match="missing '4.weight'"):
        p.init(mlp(depth=2))
    with pytest.raises(ValueError, match=r"'0.weight': expected float64 \(6, 6\); got .*\(7, 7\)"):
        p.init(mlp(width=7))
    with pytest.raises(ValueError, match="unknown name 'extra'"):
        p.init({**dict(net.named_parameters()), "extra": torch.ones(1)})


def test_values_that_cannot_be_represented():
    tree = {"w": torch.tensor([0.5, -1.0])}
    for transform, match in [(Positive(), "to be positive"), (Interval(0, 1), "strictly between")]:
        with pytest.raises(ValueError, match=f"'w': .*{match}.*clamp the value first"):
            fp.parametrize(tree, {"w": transform}).init(tree)
    for bad in (float("nan"), float("inf")):
        tree = {"w": torch.tensor([1.0, bad])}
        with pytest.raises(ValueError, match="'w': expected finite values; got NaN or infinity"):
            fp.parametrize(tree, {"w": WeightNorm()}).init(tree)


def test_no_right_inverse_says_what_to_use():
    tree = {"w": torch.randn(3, 3)}
    for transform, match in [
        (Orthogonal("cayley", trivialize=False), "use trivialize=True"),
        (fp.transform(torch.exp), r"Make it with fp.transform\(forward, right_inverse\)"),
    ]:
        p = fp.parametrize(tree, {"w": transform})
        with pytest.raises(NotImplementedError, match=f"'w': .*{match}"):
            p.init(tree)
        assert p({"w": torch.zeros(3, 3)})["w"].shape == (3, 3)  # raw can be given


def test_arguments_of_transforms():
    for make, match in [
        (lambda: Orthogonal("euler"), "'qr', 'newton_schulz'; got 'euler'"),
        (lambda: Interval(1, 0), "low to be below high; got low=1, high=0"),
        (lambda: Interval(0, float("inf")), "high to be a finite number; got inf"),
        (lambda: LoRA(rank=0), "rank to be a positive integer; got 0"),
        (lambda: SpectralNorm(n_power_iterations=0), "a positive integer or None; got 0"),
        (lambda: SpectralNorm(eps=0.0), "eps to be a positive finite number; got 0.0"),
        (lambda: fp.transforms.Chain(), "at least one transform"),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(TypeError, match="Chain expects transforms; got <class"):
        fp.transforms.Chain(Positive)
    with pytest.raises(ValueError, match=r"'w': .*both sides at least 4; got shape \(3, 5\)"):
        fp.parametrize({"w": torch.ones(3, 5)}, {"w": LoRA(rank=4)})
    with pytest.raises(ValueError, match="'w': .*only the first transform of a chain"):
        fp.parametrize(
            {"w": torch.ones(3, 3)}, {"w": fp.transforms.Chain(Symmetric(), WeightNorm())}
        )


def test_frozen_leaves_nothing_to_train():
    net = mlp()
    p = fp.parametrize(net, {"0.*": Frozen(), "*.weight": WeightNorm()})
    raw, state = p.init(net)
    assert raw["0.weight"] == {}
    g = grad(loss_of(net, p))(raw, state, torch.ones(1, 6).double(), torch.ones(1, 6).double())
    assert g["0.weight"] == {}


def test_equal_leaves_are_worked_out_once():
    seen = []

    def doubled(raw):
        seen.append(raw.shape)
        return 2 * raw

    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(5)], nn.Linear(3, 4))
    p = fp.parametrize(net, {"*.weight": fp.transform(doubled, lambda value: value / 2)})
    assert seen == [(3, 3), (4, 3)]
    assert [entry.name for entry in p.entries if entry.transform] == [
        f"{i}.weight" for i in range(6)
    ]
