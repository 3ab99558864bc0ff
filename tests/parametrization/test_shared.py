"""One raw that feeds many weights: transforms that take the values of other weights."""

import copy
import pickle

import peft
import pytest
import torch
from peft import VeraConfig
from torch import nn
from torch.func import functional_call, grad, vmap

import funcparam as fp
from funcparam.compat import to_stateful
from funcparam.transforms import (
    Cat,
    Chain,
    FakeQuantize,
    Frozen,
    Identity,
    Orthogonal,
    RotateIn,
    RotateOut,
    SpectralNorm,
    VeRA,
)

D = torch.float64
close = torch.testing.assert_close


class Pair(nn.Module):
    """Two layers whose hidden numbers can be turned, and a rotation that no layer uses."""

    def __init__(self, hidden=4, dtype=D):
        super().__init__()
        self.up = nn.Linear(3, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, 2, dtype=dtype)
        self.R = nn.Parameter(torch.eye(hidden, dtype=dtype))

    def forward(self, x):
        return self.down(self.up(x))


RULES = {
    "R": Orthogonal(),
    "up.*": RotateOut("R"),
    "down.weight": RotateIn("R"),
}


def turned(net=None, rules=RULES):
    """A parametrization away from its start."""
    net = net or Pair()
    p = fp.parametrize(net, rules)
    raw, state = p.init(net)
    raw["R"] = raw["R"] + torch.randn_like(raw["R"])
    return net, p, raw, state


def test_values_and_the_network():
    net, p, raw, state = turned()
    values = p(raw, state)
    R = values["R"]
    close(values["up.weight"], R.mT @ net.up.weight)
    close(values["up.bias"], R.mT @ net.up.bias)
    close(values["down.weight"], net.down.weight @ R)
    x = torch.randn(5, 3, dtype=D)
    close(functional_call(net, values, (x,)), net(x))


def test_raw_is_there_once_and_its_gradients_add():
    net, p, raw, state = turned()
    assert {name for name, own in raw.items() if not isinstance(own, dict)} == {"R", "down.bias"}
    weights = torch.randn(4, 3, dtype=D), torch.randn(2, 4, dtype=D)

    def loss(raw):
        values = p(raw, state)
        return (values["up.weight"] * weights[0]).sum() + (values["down.weight"] * weights[1]).sum()

    def by_hand(X):
        R = Orthogonal().forward(X, state["R"])
        first = (R.mT @ net.up.weight.detach() * weights[0]).sum()
        return first + (net.down.weight.detach() @ R * weights[1]).sum()

    close(grad(loss)(raw)["R"], grad(by_hand)(raw["R"]))


def test_values_are_kept_whatever_is_taken():
    net = Pair()
    nn.init.orthogonal_(net.R)
    p = fp.parametrize(net, RULES)
    raw, state = p.init(net)
    close(p(raw, state), dict(net.named_parameters()), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(state["down.weight"]["base"], net.down.weight)
    close(p(*p.right_inverse(p(raw, state))), p(raw, state))


def test_blocks_of_a_smaller_rotation():
    net = Pair(hidden=6)
    net.R = nn.Parameter(torch.eye(3, dtype=D))
    _, p, raw, state = turned(net)
    values = p(raw, state)
    R = torch.block_diag(values["R"], values["R"])
    close(values["down.weight"], net.down.weight @ R)
    close(values["up.bias"], R.mT @ net.up.bias)


def test_state_never_holds_what_is_taken():
    rules = RULES | {"down.weight": Chain(RotateIn("R"), SpectralNorm())}
    _, p, raw, state = turned(rules=rules)
    keys = {name: list(own) for name, own in state.items()}
    for new in (p.update(raw, state), p.advance(raw, state)[1], p.rebase(raw, state)[1]):
        assert {name: list(own) for name, own in new.items()} == keys
    values, _ = p.advance(raw, state)
    assert not torch.equal(values["down.weight"], p(raw, state)["down.weight"])  # v turns too
    close(p(*p.rebase(raw, state)), p(raw, state))
    assert p.rebase(raw, state)[0]["R"].count_nonzero() == 0
    for _ in range(100):
        state = p.update(raw, state)
    assert p.violation(p(raw, state), state)["down.weight"] < 1e-9


@pytest.mark.parametrize(
    "transform",
    [Chain(RotateIn("R"), FakeQuantize(4)), Cat([RotateIn("R"), Identity()])],
    ids=str,
)
def test_parts_that_take(transform):
    net, p, raw, state = turned(rules=RULES | {"down.weight": transform})
    values = p(raw, state)
    R = values["R"]
    if isinstance(transform, Chain):
        own = {key: state["down.weight"][f"1.{key}"] for key in ("scale", "zero_point")}
        close(
            values["down.weight"], FakeQuantize(4).forward(state["down.weight"]["0.base"] @ R, own)
        )
    else:
        close(values["down.weight"][:1], net.down.weight[:1] @ R)
        close(values["down.weight"][1:], net.down.weight[1:])


def test_vmap_compile_and_pickle():
    _, p, raw, state = turned()
    raw["down.bias"] = raw["down.bias"].detach()
    many = raw | {"R": torch.randn(3, 4, 4, dtype=D)}
    axes = {name: 0 if name == "R" else None for name in raw}
    batched = vmap(p, in_dims=(axes, None))(many, state)
    each = [p(raw | {"R": X}, state) for X in many["R"]]
    close(batched["down.weight"], torch.stack([values["down.weight"] for values in each]))
    compiled = torch.compile(p, fullgraph=True, backend="aot_eager")
    close(compiled(raw, state), p(raw, state))
    again = pickle.loads(pickle.dumps(p))
    assert again == p
    close(again(raw, state), p(raw, state))


@pytest.mark.parametrize("recompute", [False, True])
def test_shell(recompute, tmp_path):
    net = Pair(hidden=128, dtype=torch.float32)
    net.up = nn.Linear(512, 128)
    net.down = nn.Linear(128, 512)
    p = fp.parametrize(net, RULES)
    model = fp.Parametrized(net, p, recompute=recompute)
    x = torch.randn(4, 512)
    close(model(x), net(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.raw.R.add_(0.1 * torch.randn(128, 128))
    close(model(x), net(x), rtol=1e-4, atol=1e-5)  # whatever the rotation is
    model(x).square().sum().backward()
    assert model.raw.R.grad is not None
    again = fp.Parametrized(net, p)
    again.load_state_dict(model.state_dict())
    close(again(x), model(x), rtol=0, atol=1e-5)
    plain = model.fold()
    assert type(plain) is Pair
    close(plain(x), model(x), rtol=0, atol=1e-5)
    close(plain.down.weight, p(*model.raw_and_state())["down.weight"], rtol=0, atol=1e-6)
    twin = copy.deepcopy(model)
    close(twin(x), model(x), rtol=0, atol=1e-5)


def test_files(tmp_path):
    _, p, raw, state = turned()
    file = fp.checkpoint.write(p, raw, state)
    found = fp.checkpoint.read(file, p)
    close(p(found.raw, found.state), p(raw, state))
    assert found.state["down.weight"].keys() == {"base"}
    without_p = fp.checkpoint.read(file)
    assert without_p.p["down.weight"] == RotateIn("R")
    plain = fp.checkpoint.convert(file, p, style="plain")
    close(dict(plain), p(raw, state))
    by_value = fp.checkpoint.read(plain, p)  # the values, not turned a second time
    close(p(by_value.raw, by_value.state), p(raw, state))


def test_tables():
    _, p, raw, state = turned()
    text = str(p.summary(raw, state))
    assert "RotateIn(rotation='R')" in text
    assert "not measured" in text
    assert "Orthogonal" in str(p.plan())
    assert "RotateOut('R')" in str(p) or "RotateOut(rotation='R')" in str(p)


def test_training_of_one_rotation_for_quantized_weights():
    torch.manual_seed(0)
    net = Pair(hidden=16)
    with torch.no_grad():
        net.down.weight[:, 0] *= 30  # an outlier, which a rotation spreads
    rules = RULES | {"down.weight": Chain(RotateIn("R"), FakeQuantize(3, dim=0))}
    p = fp.parametrize(net, rules)
    raw, state = p.init(net)
    x = torch.randn(256, 3, dtype=D)
    target = net(x).detach()

    turned_alone = fp.parametrize(net, RULES)

    def with_ranges(raw):
        """State whose scale is that of the value as it is turned now."""
        own = {**state, "down.weight": {"base": state["down.weight"]["0.base"]}}
        range_ = turned_alone(raw, own)["down.weight"].abs().amax(1)
        return {**state, "down.weight": {**state["down.weight"], "1.scale": range_ / 3}}

    def loss(R):
        full = raw | {"R": R}
        return (functional_call(net, p(full, with_ranges(full)), (x,)) - target).square().mean()

    R = raw["R"]
    before = loss(R)
    optimizer = torch.optim.Adam([R.requires_grad_()], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(R).backward()
        optimizer.step()
    assert loss(R) < 0.7 * before


def test_groups_know_the_rotation():
    net, p, _, _ = turned()
    model = fp.Parametrized(net, p)
    assert {name for name, _ in model.named_parameters()} == {"raw.R", "net.down.bias"}


def test_vera_with_factors_for_all_layers():
    """As published, and in peft: one A and one B, of which each layer takes what it needs."""
    layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7))
    weights = {f"{i}.weight": layers[i].weight.detach().clone() for i in range(2)}
    net = peft.get_peft_model(layers, VeraConfig(r=3, target_modules=["0", "1"])).base_model.model
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    factors = {"A": net[0].vera_A["default"], "B": net[0].vera_B["default"]}
    tree = weights | factors
    rules = {"A": Frozen(), "B": Frozen(), "*.weight": VeRA(3, A="A", B="B")}
    p = fp.parametrize(tree, rules)
    raw, state = p.init(tree)
    close(p(raw, state), tree)
    assert state["0.weight"].keys() == {"base"}
    for i in range(2):
        raw[f"{i}.weight"] = {
            "b": net[i].vera_lambda_b["default"].detach(),
            "d": net[i].vera_lambda_d["default"].detach(),
        }
    values = p(raw, state)
    for i in range(2):
        net[i].merge()
        close(values[f"{i}.weight"], net[i].get_base_layer().weight.detach(), rtol=1e-5, atol=1e-6)


def test_it_has_no_stateful_form():
    net, p, raw, state = turned()
    with pytest.raises(ValueError, match="takes the value of another weight"):
        to_stateful(net, p, raw, state)


def test_adding_a_rule_moves_what_is_there():
    """A move between parametrizations hands on what is taken, on both sides."""
    net, p, raw, state = turned()
    q = fp.parametrize(net, {**p, "down.bias": Identity()})
    values = p(raw, state)
    new_raw, new_state = q.init(values)
    close(q(new_raw, new_state), values)


def test_half_precision_weights_and_a_rotation_in_float32():
    net = Pair()
    tree = {
        "R": torch.linalg.qr(torch.randn(4, 4))[0],
        "down": net.down.weight.detach().bfloat16(),
    }
    p = fp.parametrize(tree, {"R": Orthogonal(), "down": RotateIn("R")})
    raw, state = p.init(tree)
    value = p(raw, state)["down"]
    assert value.dtype == torch.bfloat16
    exact = state["down"]["base"].double() @ p(raw, state)["R"].double()
    close(value, exact.bfloat16(), rtol=0.01, atol=0.01)


def test_a_weight_that_takes_another_is_loaded_alone():
    """Its base is turned back by the rotation that the module has, not by none."""
    torch.manual_seed(0)
    model = fp.Parametrized(net := Pair(), fp.parametrize(net, RULES))
    with torch.no_grad():
        model.raw.R.normal_()
    before, new = model.values(), torch.randn_like(net.down.weight)
    keys = model.load_state_dict({"down.weight": new}, strict=False)
    assert "R" in keys.missing_keys
    torch.testing.assert_close(model.values(), {**before, "down.weight": new})
    with pytest.raises(ValueError, match=r"'down.weight' is stored as its value, and Rota.*'R'"):
        fp.checkpoint.read({"down.weight": new}, model.parametrization, strict=False)
    both = fp.checkpoint.read(
        {"down.weight": new, "R": before["R"]}, model.parametrization, strict=False
    )
    part = model.parametrization.select("down.weight", "R")
    torch.testing.assert_close(part(part.of(both.raw), part.of(both.state))["down.weight"], new)
