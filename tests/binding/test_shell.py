"""The network of a shell is really there: what one does with a network works, or raises."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn

import funcparam as fp
from funcparam.transforms import Orthogonal, Positive, SpectralNorm, WeightNorm


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6))


def shell(rules=None, net=None, **options):
    net = net or network()
    return fp.Parametrized(net, fp.parametrize(net, rules or {"0.weight": WeightNorm()}), **options)


X = torch.linspace(-1, 1, 48).reshape(8, 6)


# What walks modules


def test_statistics_are_updated_for_an_average():
    model = shell()
    averaged = AveragedModel(model)
    update_bn([X + 5] * 3, averaged)
    assert averaged.module.net[1].running_mean.abs().sum() > 0
    assert averaged.module.net[1].num_batches_tracked == 3


def test_batch_norm_is_synchronised():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(shell())
    assert isinstance(model.net[1], nn.SyncBatchNorm)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(shell({"1.weight": Positive()}))
    plain = shell({"1.weight": Positive()})
    torch.testing.assert_close(model.eval()(X), plain.eval()(X))


def test_apply_freezing_and_replacing_by_type():
    model = shell()
    seen = []
    model.apply(seen.append)
    assert any(isinstance(m, nn.Linear) for m in seen)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.requires_grad_(False)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not model.net[1].weight.requires_grad
    assert torch.equal(model(X), model(X))  # nothing is dropped
    model.net[2] = nn.Identity()
    assert torch.equal(model(X), model(X))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_wrappers_of_parts():
    model = shell({"0.weight": WeightNorm(), "3.weight": SpectralNorm()}).eval()
    before = model(X)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Linear))
    assert torch.equal(model(X), before)
    model.net[1] = torch.compile(model.net[1], backend="eager")
    torch.testing.assert_close(model(X), before)
    folded = model.fold()
    torch.testing.assert_close(folded(X), before)


class Scaled(nn.Linear):
    """Has extra state, a hook and a rule of its own for old files."""

    def __init__(self, *args):
        super().__init__(*args)
        self.factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)

    def get_extra_state(self):
        return {"factor": self.factor}

    def set_extra_state(self, state):
        self.factor = state["factor"]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}beta" in state_dict:
            state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}beta")
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_extra_state_and_rules_for_old_files():
    net = Scaled(3, 3)
    net.factor = 7.0
    model = shell({"weight": WeightNorm()}, net).eval()
    fresh = shell({"weight": WeightNorm()}, Scaled(3, 3)).eval()
    x = torch.ones(2, 3)
    for given in (model.state_dict(), net.state_dict()):
        fresh.net.factor = 1.0
        assert not any(fresh.load_state_dict(given))
        torch.testing.assert_close(fresh(x), model(x))
    old = net.state_dict()
    old["beta"] = old.pop("bias") + 1
    fresh.load_state_dict(old)
    torch.testing.assert_close(fresh.net.bias, net.bias + 1)
    model = shell({"0.weight": WeightNorm()})
    old = network().state_dict()
    del old["1.num_batches_tracked"]  # before version 2 of BatchNorm
    del old._metadata["1"]["version"]
    assert not any(model.load_state_dict(old))


def test_hooks_of_the_network_run():
    net = network()
    seen = []
    net[3].register_forward_hook(lambda m, args, out: seen.append("forward"))
    net[3].register_full_backward_hook(lambda m, *_: seen.append("backward"))
    net.register_state_dict_post_hook(
        lambda m, d, prefix, _: d.update({f"{prefix}note": torch.ones(1)})
    )
    model = shell({"0.weight": WeightNorm(), "3.weight": Orthogonal()}, net)
    model(X).sum().backward()
    assert seen == ["forward", "backward"]
    assert "net.note" in model.state_dict()


class Ring(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("all", torch.zeros(4))
        self.register_buffer("head", self.all[:2])
        self.l = nn.Linear(2, 2)

    def forward(self, x):
        self.all.add_(1)
        return self.l(x) + self.head


def test_buffers_that_share_memory_still_do():
    x = torch.zeros(1, 2)
    model = shell({"l.weight": Orthogonal()}, Ring())
    for net in (model, fp.fold(Ring(), {}), model.fold()):
        with torch.no_grad():
            a, b = net(x), net(x)
        torch.testing.assert_close(b - a, torch.ones(1, 2))


class Tagged(nn.Parameter):
    pass


def test_what_has_no_rule_keeps_its_class():
    net = nn.Linear(3, 3)
    net.bias = Tagged(torch.ones(3))
    model = shell({"weight": Orthogonal()}, net)
    assert type(model.net.bias) is type(model.fold().bias) is Tagged
    assert model.raw_and_state()[0]["bias"] is model.net.bias


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.net = nn.Sequential(self.lin, self.norm, self.lin, self.norm)

    def forward(self, x):
        return self.net(x)


def test_modules_that_are_used_twice():
    net = Twice()
    model = shell({"lin.weight": SpectralNorm()}, net)
    x = torch.randn(8, 4)
    for steps in (2, 4, 6):
        model(x).sum().backward()
        assert model.net.norm.num_batches_tracked == steps
        assert model.net.lin.weight is None
    copy.deepcopy(model)
    own = net.lin.weight
    p = model.parametrization
    values = p(*p.init(net))
    fp.functional_call(net)(values, (x,))
    assert net.lin.weight is own
    compiled = torch.compile(lambda x: fp.functional_call(net)(values, (x,)), backend="eager")
    compiled(x)
    assert net.lin.weight is own


# Reaching the network


class Coder(nn.Module):
    """Has methods, attributes and a signature."""

    size = 3

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 3)
        self.notes = ["a"]

    @property
    def device(self):
        return next(self.parameters()).device

    def encode(self, x):
        """Encode."""
        return self.l(x)

    @torch.no_grad()
    def generate(self, x, *, steps=2):
        for _ in range(steps):
            x = self(x, labels=None)["y"]
        return x

    def forward(self, x, labels=None, *, scale=1.0):
        return {"y": scale * self.encode(x).sin(), "labels": labels}


def test_methods_and_attributes():
    net = Coder()
    model = shell({"l.weight": Orthogonal()}, net)
    plain = model.fold()
    x = torch.randn(2, 3)
    assert torch.equal(model.encode(x), plain.encode(x))
    assert torch.equal(model.generate(x, steps=3), plain.generate(x, steps=3))
    with model.bound() as bound:
        assert bound is model.net
        assert torch.equal(bound.encode(x), plain.encode(x))
    assert model.size == 3
    assert model.notes == ["a"]
    assert model.device == torch.device("cpu")
    assert model.encode.__doc__ == "Encode."
    assert model.l is model.net.l
    with pytest.raises(AttributeError, match="'Coder' object has no attribute 'nothing'"):
        _ = model.nothing
    model.encode(x).square().sum().backward()
    assert model.raw.l.weight.grad is not None


def test_a_method_advances_what_evolves_in_training_mode():
    model = shell({"l.weight": SpectralNorm()}, Coder())
    with torch.no_grad():
        model.raw.l.weight.normal_()
    u = model.state.l.weight.u.clone()
    model.encode(torch.ones(1, 3))
    assert not torch.equal(model.state.l.weight.u, u)
    u = model.eval().state.l.weight.u.clone()
    model.encode(torch.ones(1, 3))
    assert torch.equal(model.state.l.weight.u, u)


def test_its_signature_is_the_networks():
    model = shell({"l.weight": Orthogonal()}, Coder())
    expected = list(inspect.signature(Coder.forward).parameters)
    assert list(inspect.signature(type(model).forward).parameters) == expected
    assert list(inspect.signature(model.forward).parameters) == expected[1:]
    assert isinstance(model, fp.Parametrized)
    assert type(model) is type(shell({"l.weight": WeightNorm()}, Coder()))
    assert type(model) is not type(shell())
    assert type(model).__name__ == "Parametrized[Coder]"
    again = type(model)(network(), shell().parametrization)
    assert type(again) is type(shell())
    program = torch.export.export(
        model.eval(), (torch.ones(2, 3),), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}}
    )
    assert program.module()(torch.ones(5, 3))["y"].shape == (5, 3)


def test_a_subclass_keeps_its_own_forward():
    class Loss(fp.Parametrized):
        def forward(self, x, y):
            return (super().forward(x)["y"] - y).square().mean()

    net = Coder()
    model = Loss(net, fp.parametrize(net, {"l.weight": Orthogonal()}))
    x = torch.ones(2, 3)
    for loss in (model, copy.deepcopy(model)):
        assert isinstance(loss, Loss)
        assert list(inspect.signature(loss.forward).parameters) == ["x", "y"]
        assert loss(x, x).ndim == 0


# Given raw and state


def test_raw_and_state_can_be_given():
    net = network()
    rules = {"0.weight": SpectralNorm(), "3.weight": Orthogonal(), "1.weight": Positive()}
    p = fp.parametrize(net, rules)
    raw, state = p.init(net)
    raw = torch.utils._pytree.tree_map(lambda t: t + 0.1, raw)
    model = fp.Parametrized(net, p, raw=raw, state=state)
    torch.testing.assert_close(model.values(), p(raw, state), rtol=0, atol=0)
    torch.testing.assert_close(p(*model.raw_and_state()), p(raw, state), rtol=0, atol=0)
    raw["0.bias"].zero_()
    assert model.net[0].bias.abs().sum() > 0  # a copy
    assert net[0].bias.abs().sum() > 0
    again = fp.Parametrized(
        net, p, **dict(zip(["raw", "state"], model.raw_and_state(), strict=True))
    )
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="raw: missing '0.weight'"):
        fp.Parametrized(net, p, raw={})
    with pytest.raises(ValueError, match="state: missing '0.weight'"):
        fp.Parametrized(net, p, raw=raw)


def test_a_network_that_the_transforms_refuse_can_take_raw():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(-1)
    p = fp.parametrize(net, {"weight": Positive()})
    with pytest.raises(ValueError, match="positive"):
        fp.Parametrized(net, p)
    model = fp.Parametrized(net, p, raw={"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
    assert (model.values()["weight"] > 0).all()


def test_from_a_checkpoint_alone(tmp_path):
    net = network()
    model = shell({"0.weight": SpectralNorm(), "1.weight": Positive()}, net)
    model(X)
    fp.checkpoint.save(model.state_dict(), tmp_path / "a.pt")
    other = network()
    with torch.no_grad():
        other[1].weight.fill_(-1)
    again = fp.Parametrized.from_checkpoint(other, tmp_path / "a.pt")
    assert again.parametrization == model.parametrization
    torch.testing.assert_close(again.eval()(X), model.eval()(X), rtol=0, atol=0)
    with pytest.raises(ValueError, match="the file is of another network: rule '0.weight'"):
        fp.Parametrized.from_checkpoint(nn.Linear(2, 2), tmp_path / "a.pt")


# Loading


def test_another_transform_in_the_file_is_read_by_value():
    net = nn.Linear(4, 4)
    exact = shell({"weight": Orthogonal()}, net)
    with torch.no_grad():
        exact.raw.weight.normal_()
    other = shell({"weight": Orthogonal("cayley")}, net)
    other.load_state_dict(exact.state_dict())
    torch.testing.assert_close(other.values(), exact.values(), rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    torch.save(exact.state_dict(), buffer)
    buffer.seek(0)
    nested = nn.Sequential(shell({"weight": Orthogonal("cayley")}, net))
    file = torch.load(buffer)
    renamed = type(file)((f"0.{key}", t) for key, t in file.items())
    renamed._metadata = {f"0.{k}".rstrip("."): v for k, v in file._metadata.items()}
    nested.load_state_dict(renamed)
    torch.testing.assert_close(nested[0].values(), exact.values(), rtol=1e-4, atol=1e-5)


def test_files_of_before():
    """Raw of all names, and `net_buffers`."""
    net = network()
    model = shell({"0.weight": SpectralNorm()}, net)
    with torch.no_grad():
        for own in model.parameters():
            own.add_(1)
    raw, state = model.raw_and_state()
    old = {f"raw.{name}": t.detach().clone() for name, t in raw.items()}
    old |= {f"state.0.weight.{key}": t.clone() for key, t in state["0.weight"].items()}
    old |= {f"net_buffers.{name}": t.clone() for name, t in model.net.named_buffers()}
    fresh = shell({"0.weight": SpectralNorm()}, net)
    assert not any(fresh.load_state_dict(old))
    torch.testing.assert_close(dict(fresh.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "inner."])
def test_a_part_of_a_plain_file(prefix):
    net = network()
    model = shell({"0.weight": Orthogonal(), "3.weight": WeightNorm()}, net)
    top = nn.ModuleDict({"inner": model}) if prefix else model
    backbone = {f"{prefix}{k}": 2 * t for k, t in net.state_dict().items() if k[0] in "01"}
    with pytest.warns(UserWarning, match=f"'{prefix}0.weight' by up to"):
        found = top.load_state_dict(backbone, strict=False)
    assert found.missing_keys == [f"{prefix}3.bias", f"{prefix}3.weight"]
    assert found.unexpected_keys == []
    torch.testing.assert_close(model.net[0].bias, 2 * net[0].bias)
    plain = {f"{prefix}{k}": t for k, t in net.state_dict().items()}
    plain[f"{prefix}head.weight"] = torch.ones(1)
    with pytest.warns(UserWarning, match="projected"):
        assert top.load_state_dict(plain, strict=False).unexpected_keys == [f"{prefix}head.weight"]


def test_loading_by_assignment_and_replacing_a_tensor_of_raw():
    model, other = shell(), shell()
    given = {name: t.clone() + 1 for name, t in other.state_dict().items() if t.is_floating_point()}
    model.load_state_dict(given, assign=True, strict=False)
    assert model.get_parameter("raw.0.weight.magnitude").data_ptr() == (
        given["raw.0.weight.magnitude"].data_ptr()
    )
    other.load_state_dict(given, strict=False)
    torch.testing.assert_close(model.eval()(X), other.eval()(X))
    own = model.raw.get_submodule("0.weight")
    own.magnitude = nn.Parameter(2 * own.magnitude)
    torch.testing.assert_close(model.values()["0.weight"], 2 * other.values()["0.weight"])


def test_errors_of_loading_begin_with_the_cause():
    model = shell()
    plain = network().state_dict()
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict({**plain, "head.weight": torch.ones(1)})
    lines = str(error.value).splitlines()
    assert lines[1].strip() == 'Unexpected key(s) in state_dict: "head.weight". '.strip()
    assert len(lines) == 2
    with pytest.raises(
        RuntimeError, match=r"^loading into a Parametrized\[Sequential\]: '0.weight'"
    ):
        model.load_state_dict({**plain, "0.weight": torch.ones(2, 2)})
    del plain["0.weight"]
    with pytest.raises(RuntimeError, match='Missing key.s. in state_dict: "0.weight"'):
        model.load_state_dict(plain)


# What cannot work


def test_a_write_to_a_ruled_weight_is_an_error():
    model = shell()
    model.net[0].weight = nn.Parameter(torch.eye(6))
    for use in (lambda: model(X), model.fold, model.values, model.summary, model.violation):
        with pytest.raises(RuntimeError, match="'0.weight' of this Parametrized's network was wri"):
            use()
    model.net[0].weight = None
    model(X)
    with pytest.raises(AttributeError, match="NoneType"):
        nn.init.zeros_(model.net[0].weight)
    model.net[0] = nn.Linear(6, 6)
    with pytest.raises(RuntimeError, match="'0.weight' of this Parametrized's network was written"):
        model.eval()(X)
    model.net[0] = nn.Identity()
    with pytest.raises(RuntimeError, match="'0.weight' is no more in the network"):
        model(X)


@pytest.mark.parametrize(
    ("net", "rules"),
    [
        (nn.Linear(3, 3), {"bias": WeightNorm(dim=None)}),
        (nn.LayerNorm(3), {"weight": Positive()}),
    ],
)
def test_a_network_that_is_called_past_its_shell_is_an_error(net, rules):
    model = shell(rules, net)
    x = torch.randn(2, 3)
    expected = model(x)
    with pytest.raises(RuntimeError, match="is computed by a Parametrized. Call that"):
        model.net(x)
    with model.bound() as bound:
        assert torch.equal(bound(x), expected)
    for twin in (copy.deepcopy(model), torch.load(saved(model), weights_only=False)):
        with pytest.raises(RuntimeError, match="is computed by a Parametrized. Call that"):
            twin.net(x)
    torch.testing.assert_close(model.fold()(x), expected)
    assert not model.fold()._forward_pre_hooks


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_pruning():
    model = shell({"0.weight": Orthogonal()})
    before = list(model.state_dict())
    with pytest.raises(TypeError, match="torch.nn.utils.prune is the transform Mask"):
        prune.l1_unstructured(model.raw.get_submodule("0"), "weight", 0.3)
    with pytest.raises(TypeError, match="a hook would not run"):
        model.raw.register_forward_pre_hook(print)
    assert list(model.state_dict()) == before
    prune.l1_unstructured(model.net[3], "weight", 0.5)  # it has no rule
    model(X).sum().backward()
    assert model.net[3].weight_orig.grad is not None
    with pytest.raises(TypeError, match="NoneType"):
        prune.l1_unstructured(model.net[0], "weight", 0.3)
    with pytest.raises(RuntimeError, match="'0.weight' is no more in the network"):
        model(X)


@pytest.mark.parametrize("key", ["scale", "type", "float", "train", "forward", "training"])
def test_raw_may_have_any_key(key):
    net = nn.Linear(2, 2)
    transform = fp.transform(lambda raw: 2 * raw[key], lambda value: {key: value / 2})
    model = shell({"weight": transform}, net)
    assert list(model.state_dict()) == ["net.bias", f"raw.weight.{key}"]
    twin = copy.deepcopy(model).double()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(torch.ones(1, 2).double()), net(torch.ones(1, 2)).double())
    holder = nn.Module()
    holder._modules["half"] = nn.Linear(2, 2)
    holder.forward = lambda x: holder._modules["half"](x)
    fp.Parametrized(holder, fp.parametrize(holder, {"half.weight": Orthogonal()}))


def test_fx():
    model = shell({"0.weight": Orthogonal()}).eval()
    graph = torch.fx.symbolic_trace(nn.Sequential(model, nn.ReLU()))
    torch.testing.assert_close(graph(X), model(X).relu())
    assert "call_module" in {node.op for node in graph.graph.nodes}
    with pytest.raises(TypeError, match="a module around it"):
        torch.fx.symbolic_trace(model)


# Transforms


@pytest.mark.parametrize("transform", [WeightNorm(), SpectralNorm()], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_ensemble_of_shells(transform, training, compiled):
    models = [shell({"weight": transform}, nn.Linear(6, 6)).train(training) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            next(model.raw.parameters()).normal_()
    params, buffers = stack_module_state(models)
    x = torch.randn(2, 4, 6)

    def call(params, buffers, x):
        return vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(params, buffers, x)

    out = (torch.compile(call, backend="aot_eager") if compiled else call)(params, buffers, x)
    expected = torch.stack([model(own) for model, own in zip(models, x, strict=True)])
    torch.testing.assert_close(out, expected)
    for i, model in enumerate(models):
        for name, own in model.named_buffers():
            torch.testing.assert_close(buffers[name][i], own)


def test_tables_and_pictures():
    model = shell({"0.weight": Orthogonal(), "3.weight": WeightNorm()})
    p = model.parametrization
    assert repr(model.summary()) == repr(p.summary(*model.raw_and_state()))
    assert model.violation().keys() == {"0.weight", "3.weight"}
    assert "<table>" in model._repr_html_()
    assert "BatchNorm1d" in model._repr_html_()
    pytest.importorskip("matplotlib").use("agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.close(model.plot())
