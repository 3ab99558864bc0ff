"""Groups for optimizers: what each tensor is, the partition, and one optimizer made of two."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

import funcparam as fp
from funcparam.transforms import (
    Ball,
    BlockDiagonal,
    Chain,
    Frozen,
    LoRA,
    Orthogonal,
    Positive,
    Symmetric,
    UnitNorm,
    WeightNorm,
)
from tests.cases import every_case, raw_and_state


@every_case
def test_roles_are_what_they_say(case, shape):
    """A direction may be scaled without effect, and what stands for the value may not."""
    raw, state = raw_and_state(case, shape)
    named = {"": raw} if isinstance(raw, torch.Tensor) else raw
    assert set(case.transform.roles) <= set(named)
    value = case.transform.forward(raw, state)
    for key, tensor in named.items():
        scaled = 3 * tensor if key == "" else {**named, key: 3 * tensor}
        role = case.transform.role(key)
        if isinstance(case.transform, Ball):
            continue  # outside of the ball the length of raw does not matter, inside it does
        if role in ("direction", "weight"):
            out = case.transform.forward(scaled, state)
            assert torch.allclose(out, value, rtol=1e-6, atol=1e-9) == (role == "direction"), key
        if role == "relative" and key == "":
            base = case.transform.forward(torch.zeros_like(raw), state)
            assert case.transform.violation(base, state) < 1e-6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(4, 6, 2)
        self.experts = nn.Parameter(torch.randn(3, 5, 6))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, i):
        h = self.conv(self.emb(i).unflatten(-1, (4, 2))).squeeze(-1)
        return self.head(self.norm(torch.einsum("eoi,bi->bo", self.experts, h)))


RULES = {"conv.weight": WeightNorm(), "head.weight": Orthogonal(), "norm.weight": Positive()}
BATCH = torch.arange(7)


def network():
    net = Net()
    p = fp.parametrize(net, RULES)
    return net, p, *p.init(net)


def step(net, p, raw, state, optimizer):
    optimizer.zero_grad()
    functional_call(net, p(raw, state), (BATCH,)).square().mean().backward()
    optimizer.step()


def test_a_table_of_what_there_is():
    net, p, raw, _ = network()
    assert repr(fp.groups(raw, p, net, lr_scale={"head.*": 2.0})) == (
        "raw                    kind         matrices    decay  lr\n"
        "---------------------  -----------  ----------  -----  ---\n"
        "experts                matrix       3 of 5 x 6  yes    x 1\n"
        "emb.weight             embedding                yes    x 1\n"
        "conv.weight.magnitude  magnitude                       x 1\n"
        "conv.weight.direction  direction    6 x 8              x 1\n"
        "conv.bias              vector                          x 1\n"
        "norm.weight            coordinates                     x 1\n"
        "norm.bias              vector                          x 1\n"
        "head.weight            relative                        x 2\n"
        "head.bias              vector                          x 2"
    )


def test_the_partition_is_complete():
    net, p, raw, _ = network()
    groups = fp.groups(raw, p, net, lr_scale={"*.bias": 3.0})
    every = {id(tensor) for tensor in fp.named(raw).values()}
    for made in (groups.param_groups(0.1), groups.optimizer().param_groups):
        held = [id(tensor) for group in made for tensor in group["params"]]
        assert len(held) == len(every)
        assert set(held) == every


def test_param_groups_have_rates_and_decay():
    net, p, raw, _ = network()
    made = fp.groups(raw, p, net, lr_scale={"direction": 4.0}).param_groups(0.1, weight_decay=0.01)
    found = {name: group for group in made for name in group["names"]}
    assert found["conv.weight.direction"]["lr"] == pytest.approx(0.4)
    assert found["head.bias"]["lr"] == pytest.approx(0.1)
    decays = {name for name, group in found.items() if group["weight_decay"]}
    assert decays == {"experts", "emb.weight"}
    torch.optim.AdamW(made)


def test_without_the_network_nobody_knows_which_axes_are_the_matrix():
    _, p, raw, _ = network()
    groups = {member.name: member for member in fp.groups(raw, p)}
    assert not groups["conv.weight.direction"].is_matrix
    assert not groups["experts"].is_matrix
    groups = {m.name: m for m in fp.groups(raw, p, batch={"experts": 1, "conv.*direction": 0})}
    assert groups["conv.weight.direction"].is_matrix
    assert groups["experts"].is_matrix


def test_blocks_that_a_transform_made_are_matrices():
    p = fp.parametrize({"w": torch.eye(6)}, {"w": BlockDiagonal(3)})
    raw, _ = p.init({"w": torch.eye(6)})
    (member,) = fp.groups(raw, p)
    assert (member.kind, member.batch) == ("matrix", 1)


def test_a_chain_is_what_any_of_its_parts_makes_of_raw():
    assert Chain(Symmetric(), Orthogonal()).role("") == "relative"
    assert Chain(WeightNorm(), Symmetric()).role("magnitude") == "magnitude"
    assert Chain(Symmetric(), Symmetric()).role("") == "weight"


def test_frozen_weights_stay_frozen():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    net[1].bias.requires_grad_()
    p = fp.parametrize(net, {"0.weight": WeightNorm(), "1.weight": LoRA(2)})
    raw, _ = p.init(net)
    groups = fp.groups(raw, p, net)
    assert groups.frozen == ("0.weight.magnitude", "0.weight.direction", "0.bias")
    assert not raw["0.bias"].requires_grad
    assert raw["1.weight"]["A"].requires_grad  # an adapter trains
    assert repr(groups).count("frozen") == 3


FROZEN = ["conv.weight", "experts"]


@pytest.mark.parametrize("as_module", [False, True])
def test_raw_that_is_frozen_stays_so_and_trains_again(as_module):
    """Frozen after the groups were made, across a resume, and before them, in both forms."""
    net, p, raw, state = network()
    if as_module:
        model = fp.Parametrized(net, p)
        raw, state = model.raw_and_state()
    optimizer = fp.groups(raw, p, net).optimizer()
    step(net, p, raw, state, optimizer)
    part = p.select(*FROZEN)
    for tensor in fp.named(part.of(raw)).values():
        tensor.requires_grad_(False)
    resumed = copy.deepcopy(raw)
    groups = fp.groups(resumed, p, net)
    assert groups.frozen == ("experts", "conv.weight.magnitude", "conv.weight.direction")
    other = groups.optimizer()
    other.load_state_dict(optimizer.state_dict())
    for unfrozen in (False, True):
        for tensor in fp.named(part.of(resumed)).values():
            tensor.requires_grad_(unfrozen)
        before = {n: t.detach().clone() for n, t in fp.named(resumed).items()}
        step(net, p, resumed, state, other)
        moved = {n for n, t in fp.named(resumed).items() if not torch.equal(t, before[n])}
        assert moved == set(before) - (set() if unfrozen else set(fp.named(part.of(resumed))))


def test_what_was_frozen_in_the_network_trains_when_it_is_unfrozen():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    p = fp.parametrize(net, {"0.weight": Orthogonal()})
    model = fp.Parametrized(net, p)
    raw, _ = p.init(net)
    optimizers = [fp.groups(r, p, net).optimizer() for r in (raw, model.raw_and_state()[0])]
    model.net[0].requires_grad_()
    for tensor in fp.named(p.select("0.*").of(raw)).values():
        tensor.requires_grad_()
    for own, optimizer in zip((raw, model.raw_and_state()[0]), optimizers, strict=True):
        before = own["0.weight"].detach().clone()
        sum(t.sum() for t in fp.named(own).values()).backward()
        optimizer.step()
        assert not torch.equal(own["0.weight"], before)
        again = fp.groups(own, p, net)  # the network's own flags say nothing any more
        assert again.frozen == ()
        again.optimizer().load_state_dict(optimizer.state_dict())


def test_the_rows_of_an_embedding_are_not_orthogonalized():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.bag = nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)

    net = Bags()
    p = fp.parametrize(net, {"emb.weight": WeightNorm()})
    raw, _ = p.init(net)
    found = {m.name: (m.kind, m.is_matrix, m.decays) for m in fp.groups(raw, p, net)}
    assert found["emb.weight.direction"] == ("direction", False, False)
    assert found["bag.weight"] == ("embedding", False, True)
    kinds = {"emb.weight.direction": "matrix", "bag.weight": "vector"}
    found = {m.name: (m.is_matrix, m.decays) for m in fp.groups(raw, p, net, kinds=kinds)}
    assert found["emb.weight.direction"] == (True, True)
    assert found["bag.weight"] == (False, False)


def test_a_tie_goes_by_each_of_its_names():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    p = fp.parametrize(net, {"0.weight": WeightNorm()})
    raw, _ = p.init(net)
    groups = fp.groups(
        raw, p, net, lr_scale={"1.weight.magnitude": 3.0}, kinds={"1.weight.dir*": "vector"}
    )
    found = {m.name: m for m in groups}
    assert found["0.weight.magnitude"].lr_scale == 3
    assert found["0.weight.direction"].kind == "vector"


def test_as_by_hand():
    """Muon on matrices and directions, view by view, and AdamW on all else."""
    net, p, raw, state = network()
    theirs = copy.deepcopy(raw)
    optimizer = fp.groups(raw, p, net).optimizer(
        matrices=partial(torch.optim.Muon, lr=0.02, weight_decay=0.1),
        rest=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    )
    every = fp.named(theirs)
    for tensor in every.values():
        tensor.requires_grad_()
    experts = [every["experts"][i].detach() for i in range(3)]
    kernel = every["conv.weight.direction"].detach().view(6, 8)
    muon = torch.optim.Muon(
        [{"params": experts}, {"params": [kernel], "weight_decay": 0.0}], lr=0.02, weight_decay=0.1
    )
    others = {n: t for n, t in every.items() if n not in ("experts", "conv.weight.direction")}
    embedding = others.pop("emb.weight")
    adam = torch.optim.AdamW(
        [{"params": [embedding]}, {"params": [*others.values()], "weight_decay": 0.0}],
        lr=0.01,
        weight_decay=0.1,
    )
    for _ in range(3):
        step(net, p, raw, state, optimizer)
        for tensor in every.values():
            tensor.grad = None
        functional_call(net, p(theirs, state), (BATCH,)).square().mean().backward()
        for i, expert in enumerate(experts):
            expert.grad = every["experts"].grad[i]
        kernel.grad = every["conv.weight.direction"].grad.view(6, 8)
        muon.step()
        adam.step()
    for name, tensor in fp.named(raw).items():
        assert torch.equal(tensor, every[name]), name


def test_saved_and_resumed():
    net, p, raw, state = network()
    optimizer = fp.groups(raw, p, net).optimizer()
    for _ in range(2):
        step(net, p, raw, state, optimizer)
    other_raw, saved = copy.deepcopy(raw), copy.deepcopy(optimizer.state_dict())
    other = fp.groups(other_raw, p, net).optimizer()
    other.load_state_dict(saved)
    step(net, p, raw, state, optimizer)
    step(net, p, other_raw, state, other)
    for name, tensor in fp.named(raw).items():
        assert torch.equal(tensor, fp.named(other_raw)[name]), name


def test_a_state_is_loaded_by_names():
    """Whatever the order of raw is, and over moments that are there already."""
    net, p, raw, state = network()
    optimizer = fp.groups(raw, p, net).optimizer()
    fresh = copy.deepcopy(optimizer.state_dict())
    step(net, p, raw, state, optimizer)
    other_raw = {name: copy.deepcopy(raw[name]) for name in reversed(raw)}
    other = fp.groups(other_raw, p, net).optimizer()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(net, p, raw, state, optimizer)
        step(net, p, {name: other_raw[name] for name in raw}, state, other)
    for name, tensor in fp.named(raw).items():
        assert torch.equal(tensor, fp.named(other_raw)[name]), name
    for group in other.param_groups:
        for name, tensor in zip(group["names"], group["params"], strict=True):
            assert tensor is fp.named(other_raw)[name]
    other.load_state_dict(fresh)
    anew = fp.groups(other_raw, p, net).optimizer()
    before = copy.deepcopy(other_raw)
    step(net, p, {name: other_raw[name] for name in raw}, state, other)
    after = copy.deepcopy(other_raw)
    for name, tensor in fp.named(other_raw).items():
        tensor.detach().copy_(fp.named(before)[name])
    step(net, p, {name: other_raw[name] for name in raw}, state, anew)
    for name, tensor in fp.named(after).items():
        assert torch.equal(tensor, fp.named(other_raw)[name]), name


def test_options_that_a_later_version_has_are_its_own():
    net, p, raw, state = network()
    optimizer = fp.groups(raw, p, net).optimizer()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("maximize", None)
    optimizer.load_state_dict(saved)
    step(net, p, raw, state, optimizer)


@pytest.mark.parametrize(
    ("saved", "rules", "options", "message"),
    [
        (
            {"0.weight": Orthogonal()},
            {"2.weight": Orthogonal()},
            {},
            "state_dict: '0.weight' was trained as relative (4, 4) by AdamW, and is here as matrix",
        ),
        (
            {"0.weight": LoRA(2)},
            {"0.weight": LoRA(3)},
            {},
            "state_dict: '0.weight.A' was trained as factor (2, 4) by AdamW, and is here as factor",
        ),
        ({"0.weight": LoRA(2)}, {}, {}, "state_dict: missing '0.weight'; the closest names are"),
        ({}, {"0.weight": LoRA(2)}, {}, "state_dict: missing '0.weight.A'; the closest names are"),
        (
            {},
            {"0.weight": Frozen()},
            {},
            "state_dict: '0.weight' is nothing that this optimizer has; the closest names are",
        ),
        (
            {},
            {},
            {"lr_scale": {"0.weight": 2.0}},
            "state_dict: '0.weight' and '2.weight' have one learning rate in only one of the two",
        ),
    ],
)
def test_a_state_of_other_tensors(saved, rules, options, message):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    there, here = fp.parametrize(net, saved), fp.parametrize(net, rules)
    old_raw, old_state = there.init(net)
    old = fp.groups(old_raw, there, net).optimizer()
    functional_call(net, there(old_raw, old_state), (torch.randn(3, 4),)).sum().backward()
    old.step()
    raw, _ = here.init(net)
    optimizer = fp.groups(raw, here, net, **options).optimizer()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(old.state_dict())
    assert optimizer.state_dict() == before


def test_a_state_with_a_group_twice():
    net, p, raw, _ = network()
    optimizer = fp.groups(raw, p, net).optimizer()
    twice = copy.deepcopy(optimizer.state_dict())
    twice["param_groups"].append(copy.deepcopy(twice["param_groups"][0]))
    name = twice["param_groups"][0]["names"][0]
    with pytest.raises(ValueError, match=f"state_dict: '{name}' is there twice"):
        optimizer.load_state_dict(twice)


def test_a_state_of_another_optimizer():
    net, p, raw, _ = network()
    optimizer = fp.groups(raw, p, net).optimizer()
    for key in ("names", "shapes", "params"):
        broken = copy.deepcopy(optimizer.state_dict())
        broken["param_groups"][-1][key].pop()
        with pytest.raises(ValueError, match="state_dict: expected that of an optimizer of fp.gr"):
            optimizer.load_state_dict(broken)
    with pytest.raises(ValueError, match="state_dict: expected that of an optimizer of fp.groups"):
        optimizer.load_state_dict(torch.optim.AdamW(fp.trainable(raw)).state_dict())
    sgd = fp.groups(raw, p, net).optimizer(rest=partial(torch.optim.SGD, momentum=0.9))
    with pytest.raises(ValueError, match="'emb.weight' was trained as embedding .* by SGD, and"):
        optimizer.load_state_dict(sgd.state_dict())


def test_schedulers_scaler_closure_and_hooks():
    net, p, raw, state = network()
    optimizer = fp.groups(raw, p, net).optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0)
    before = copy.deepcopy(raw)
    step(net, p, raw, state, optimizer)
    schedule.step()
    assert all(torch.equal(t, fp.named(raw)[n]) for n, t in fp.named(before).items())
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("hook"))
    schedule.base_lrs = [1.0] * len(optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = 0.01

    def closure():
        optimizer.zero_grad()
        loss = functional_call(net, p(raw, state), (BATCH,)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)
    assert seen == ["hook", "hook"]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    scaler.scale(functional_call(net, p(raw, state), (BATCH,)).square().mean()).backward()
    moved = raw["experts"].detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(moved, raw["experts"])


def test_members_of_an_ensemble_are_orthogonalized_one_by_one():
    nets = [nn.Linear(4, 3) for _ in range(2)]
    p = fp.parametrize(nets[0], {"weight": UnitNorm()})
    raws = [p.init(net)[0] for net in nets]
    stacked = {name: torch.stack([raw[name] for raw in raws]) for name in raws[0]}
    groups = fp.groups(stacked, p, nets[0])
    assert "2 of 3 x 4" in repr(groups)
    optimizer = groups.optimizer()
    targets = torch.randn(2, 3, 4)
    (stacked["weight"] * targets).sum().backward()
    optimizer.step()
    for raw, own, target in zip(raws, stacked["weight"], targets, strict=True):
        single = fp.groups(raw, p, nets[0]).optimizer()
        (raw["weight"] * target).sum().backward()
        single.step()
        torch.testing.assert_close(own, raw["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": {"nothing": "matrix"}}, "kinds: 'nothing' matches nothing; the closest names"),
        (
            {"kinds": {"emb.*": "matrices"}},
            "kinds: 'emb.weight': expected one of matrix, embedding",
        ),
        ({"batch": {"experts": 2}}, "batch: 'experts' has shape (3, 5, 6), of which at least two"),
        ({"lr_scale": {"magnitudes": 2}}, "lr_scale: 'magnitudes' matches nothing; the closest"),
        ({"kinds": {"matrices": "vector"}}, "and the kinds are 'matrix', 'embedding', 'magnitude"),
        (
            {"lr_scale": {"conv.weight": 2}},
            "lr_scale: 'conv.weight' matches nothing; 'conv.weight.*' matches what is in it, and",
        ),
        (
            {"lr_scale": {"*": 2, "head.weight": 3}},
            "lr_scale: 'head.weight' never applies: '*' before it takes 'head.weight' and whatever",
        ),
        ({"kinds": {"vector": "matrix", "head.bias": "vector"}}, "kinds: 'head.bias' never appl"),
        ({"lr_scale": {"*": -1}}, "lr_scale: '*': expected a finite number that is not negative"),
        ({"lr_scale": {"*": float("nan")}}, "expected a finite number that is not negative; got"),
        ({"lr_scale": {"*": float("inf")}}, "expected a finite number that is not negative; got"),
    ],
)
def test_bad_options(options, message):
    net, p, raw, _ = network()
    with pytest.raises(ValueError, match=re.escape(message)):
        fp.groups(raw, p, net, **options)
    assert not any(tensor.requires_grad for tensor in fp.named(raw).values())


def test_what_is_no_number_or_no_parametrization():
    net, p, raw, _ = network()
    with pytest.raises(TypeError, match=r"lr_scale: '\*': expected a number; got str"):
        fp.groups(raw, p, net, lr_scale={"*": "3"})
    for wrong in (net, {"head.weight": Orthogonal()}):
        message = r"p: expected a parametrization, in fp.groups\(raw, p, net\); got "
        with pytest.raises(TypeError, match=message):
            fp.groups(raw, wrong, net)
    model = fp.Parametrized(net, p)
    for taken_apart in (model, model.net):  # who would have known no embedding and no kernel
        with pytest.raises(ValueError, match="net: expected the network that p was made for; it"):
            fp.groups(model.raw_and_state()[0], p, taken_apart)
    assert repr(fp.groups(raw, p, model.fold())) == repr(fp.groups(p.init(net)[0], p, net))
    raw, _ = p.init(net)
    for call in (fp.named, fp.trainable, partial(fp.groups, p=p)):
        with pytest.raises(TypeError, match=r"model.raw_and_state\(\) has that of a Parametrized"):
            call(model)
    assert not any(tensor.requires_grad for tensor in fp.named(raw).values())


def test_bad_raw():
    net, p, raw, _ = network()
    with pytest.raises(ValueError, match="raw: unknown name 'conv.weigth'; the closest"):
        fp.groups({"conv.weigth": raw["conv.weight"]}, p, net)
    message = "raw: missing 'conv.weight.direction', which would not be trained. To train a part,"
    with pytest.raises(ValueError, match=message):
        fp.groups({**raw, "conv.weight": {"magnitude": raw["conv.weight"]["magnitude"]}}, p, net)
    assert not any(tensor.requires_grad for tensor in fp.named(raw).values())
    with pytest.raises(ValueError, match="'head.bias' and 'norm.bias' are one"):
        fp.groups({"head.bias": raw["head.bias"], "norm.bias": raw["head.bias"]}, p, net)
    raw["experts"] = raw["experts"].mT
    with pytest.raises(ValueError, match="'experts': expected a contiguous tensor, of which"):
        fp.groups(raw, p, net, batch={"experts": 0}).optimizer()


def test_an_optimizer_that_cannot_take_a_shape_says_so():
    net, p, raw, _ = network()
    message = r"'conv.weight.magnitude' \(kinds= of fp.groups chooses its optimizer\): Muon only"
    with pytest.raises(ValueError, match=message):
        fp.groups(raw, p, net).optimizer(rest=torch.optim.Muon)
    with pytest.raises(ValueError, match="^Invalid learning rate: -1"):
        fp.groups(raw, p, net).optimizer(rest=partial(torch.optim.AdamW, lr=-1))
    optimizer = fp.groups(raw, p, net).optimizer()
    with pytest.raises(NotImplementedError, match="What is frozen is in them, and trains when"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    with pytest.raises(NotImplementedError, match="What is frozen is in them, and trains when"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})


def test_complex_weights_are_nobodys_matrices():
    C = torch.randn(3, 4, dtype=torch.complex64)
    p = fp.parametrize({"C": C, "W": C.real}, {})
    raw, state = p.init({"C": C, "W": C.real})
    optimizer = fp.groups(raw, p).optimizer()
    sum(x.abs().square().sum() for x in p(raw, state).values()).backward()
    optimizer.step()
    assert not torch.equal(raw["C"], C)
