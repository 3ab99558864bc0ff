"""What `load_state_dict` of a module form takes, says and refuses."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import Mask, Orthogonal, Positive, SpectralNorm, WeightNorm
from tests.checkpoint.test_found import MaskedLinear, backbone


def linear(transform=None, n=3):
    net = nn.Linear(n, n)
    return fp.Parametrized(net, fp.parametrize(net, {"weight": transform or WeightNorm()}))


def unchanged(model, before):
    return all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


# The file says what it is


def test_state_dicts_say_what_wrote_them(tmp_path):
    model = linear(Orthogonal())
    torch.save(model.state_dict(), tmp_path / "a.pt")
    checkpoint.save(model.state_dict(), tmp_path / "a.safetensors")
    files = [model.state_dict(), torch.load(tmp_path / "a.pt", weights_only=True)]
    for file in [*files, checkpoint.load(tmp_path / "a.safetensors")]:
        assert checkpoint.parametrization(file) == model.parametrization
        assert sorted(file) == ["net.bias", "raw.weight", "state.weight.base"]
        other = linear(Orthogonal("cayley"))
        assert str(other.load_state_dict(file)) == "<All keys matched successfully>"
        torch.testing.assert_close(other.values()["weight"], model.values()["weight"])


@pytest.mark.parametrize(
    "wrap", [lambda m: nn.Sequential(m), lambda m: nn.Sequential(nn.Sequential(m))]
)
def test_inside_of_another_module_too(wrap):
    model, other = linear(Orthogonal()), linear(Orthogonal("cayley"))
    wrap(other).load_state_dict(wrap(model).state_dict())
    torch.testing.assert_close(other.values()["weight"], model.values()["weight"])
    silent = dict(wrap(model).state_dict())
    wrap(other).load_state_dict(silent)  # as it always was
    assert torch.equal(other.raw.weight, model.raw.weight)


def test_what_cannot_be_converted_is_refused_and_changes_nothing():
    model = linear(Orthogonal())
    other = positive()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match="'weight' is stored as its value, but Positive"):
        other.load_state_dict(model.state_dict())
    assert unchanged(other, before)


def positive():
    net = nn.Linear(3, 3)
    with torch.no_grad():
        net.weight.abs_()
    return fp.Parametrized(net, fp.parametrize(net, {"weight": Positive()}))


def test_a_projection_warns():
    with pytest.warns(
        UserWarning, match=r"were projected: 'weight' by up to \d\.\d+, to Orthogonal"
    ) as caught:
        linear(Orthogonal()).load_state_dict(nn.Linear(3, 3).state_dict())
    assert caught[0].filename == __file__


# As strict as torch, and errors begin with the cause


def test_own_keys_are_taken_as_torch_takes_them():
    model = linear()
    given = model.state_dict()
    del given["net.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "net.bias"'):
        model.load_state_dict(given)
    assert model.load_state_dict(given, strict=False).missing_keys == ["net.bias"]


@pytest.mark.parametrize("kind", ["plain", "torch", "legacy", "funcparam"])
def test_a_file_without_the_head(kind):
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(4, 2))
    p = fp.parametrize(net, {"0.weight": WeightNorm(), "1.weight": SpectralNorm()})
    model, given = fp.Parametrized(net, p), backbone(kind)
    before = copy.deepcopy(model.state_dict())
    keys = model.load_state_dict(given, strict=False)
    assert {key.rpartition("1.")[2] for key in keys.missing_keys} >= {"bias"}
    assert keys.unexpected_keys == []
    expected = checkpoint.read(given, p, strict=False)
    direction = expected.raw["0.weight"]["direction"]
    assert torch.equal(model.state_dict()["raw.0.weight.direction"], direction)
    assert torch.equal(model.state_dict()["raw.1.weight"], before["raw.1.weight"])
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        model.load_state_dict(given)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.ReLU(), m)])
def test_keys_that_nobody_expects_are_named_as_in_the_file(wrap):
    model = wrap(linear())
    prefix = "1." if isinstance(model, nn.Sequential) else ""
    plain = wrap(nn.Linear(3, 3)).state_dict()
    given = {**plain, f"{prefix}head.weight": torch.ones(1)}
    assert model.load_state_dict(given, strict=False).unexpected_keys == [f"{prefix}head.weight"]
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\).*: "{prefix}head.weight"'):
        model.load_state_dict(given)


def test_the_cause_comes_first_where_nothing_fits():
    model = linear()
    before = copy.deepcopy(model.state_dict())
    given = {f"generator.{key}": t for key, t in nn.Linear(3, 3).state_dict().items()}
    with pytest.raises(RuntimeError, match=r"all names are there, but below 'generator\.'"):
        model.load_state_dict(given)
    with pytest.raises(RuntimeError, match=r"'weight_g': part of 'weight', of which the other"):
        model.load_state_dict({"weight_g": torch.ones(3, 1), "bias": torch.ones(3)})
    assert unchanged(model, before)


def test_wrapped_files_load():
    model, net = linear(), nn.Linear(3, 3)
    for given in (nn.DataParallel(net).state_dict(), torch.compile(net).state_dict()):
        model.load_state_dict(given)
        torch.testing.assert_close(model.values()["weight"], net.weight.detach())


# What the network has of its own


@pytest.mark.parametrize("transform", [WeightNorm(), Mask(), SpectralNorm()], ids=repr)
@pytest.mark.filterwarnings("ignore:values of the file do not satisfy")
def test_buffers_may_be_called_like_parts(transform):
    net = MaskedLinear(3, 3)
    net.weight_mask[0, 0] = 0
    fresh = MaskedLinear(3, 3)
    model = fp.Parametrized(fresh, fp.parametrize(fresh, {"weight": transform}))
    assert str(model.load_state_dict(net.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(model.net.weight_mask, net.weight_mask)


def test_statistics_from_before_they_were_counted():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = fp.Parametrized(net, fp.parametrize(net, {"0.weight": WeightNorm()}))
    old = {k: t for k, t in net.state_dict().items() if "num_batches" not in k}
    assert str(model.load_state_dict(old)) == "<All keys matched successfully>"


class Scaled(nn.Linear):
    scale = 1.0

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def test_extra_state_comes_from_plain_files_and_from_own():
    net = Scaled(3, 3)
    net.scale = 7.0
    p = fp.parametrize(net, {"weight": WeightNorm()})
    for given in (net.state_dict(), fp.Parametrized(net, p).state_dict()):
        model = fp.Parametrized(Scaled(3, 3), p)
        assert str(model.load_state_dict(given)) == "<All keys matched successfully>"
        assert model.net.scale == 7.0


def test_files_of_the_module_form_before_the_network_was_a_child():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[1].running_mean.fill_(2.0)
    p = fp.parametrize(net, {"0.weight": WeightNorm()})
    raw, _ = p.init(net)
    old = {f"raw.{n}": t for n, t in raw.items() if n != "0.weight"}
    old |= {f"raw.0.weight.{key}": t for key, t in raw["0.weight"].items()}
    old |= {f"net_buffers.{name}": t for name, t in net.named_buffers()}
    fresh = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for wrap in (lambda m: m, lambda m: nn.Sequential(m)):
        model = fp.Parametrized(fresh, p)
        prefix = "" if wrap(model) is model else "0."
        given = {f"{prefix}{key}": t for key, t in old.items()}
        assert str(wrap(model).load_state_dict(given)) == "<All keys matched successfully>"
        x = torch.randn(4, 3)
        torch.testing.assert_close(model.eval()(x), net.eval()(x))


def test_a_module_in_another_precision_loses_none():
    model = linear().double()
    old = torch_parametrizations.weight_norm(nn.Linear(3, 3).double())
    model.load_state_dict(old.state_dict())
    assert torch.equal(model.values()["weight"], old.weight.detach())


def test_what_is_written_is_what_a_module_has():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    p = fp.parametrize(net, {"0.weight": SpectralNorm()})
    model = fp.Parametrized(net, p)
    written = checkpoint.write(p, *model.raw_and_state(), net)
    own = model.state_dict()
    assert written.keys() == own.keys()
    assert written._metadata[""]["funcparam"] == own._metadata[""]["funcparam"]
    assert all(torch.equal(written[key], own[key]) for key in own)


# From a file to a module


@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_a_module_from_a_file_alone(tmp_path, end):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        net[0].weight.abs_()
    p = fp.parametrize(net, {"0.weight": Positive()})
    model = fp.Parametrized(net, p)
    model(torch.randn(8, 3))
    checkpoint.save(model.state_dict(), tmp_path / f"a.{end}")
    fresh = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))  # of which some weights are negative
    before = copy.deepcopy(fresh.state_dict())
    made = fp.Parametrized.from_checkpoint(fresh, tmp_path / f"a.{end}")
    assert made.parametrization == p
    assert unchanged(fresh, before)
    x = torch.randn(2, 3)
    assert torch.equal(made.eval()(x), model.eval()(x))
    assert [t.requires_grad for t in made.parameters()] == [True] * 4


def test_a_module_from_a_file_and_rules():
    net = nn.Linear(3, 3)
    values = {"weight": torch.rand(3, 3) + 0.1, "bias": torch.zeros(3)}
    p = fp.parametrize(net, {"weight": Positive()})
    made = fp.Parametrized.from_checkpoint(net, values, p)
    torch.testing.assert_close(made.values()["weight"], values["weight"])
    with pytest.raises(ValueError, match="the file does not say which transforms"):
        fp.Parametrized.from_checkpoint(net, values)


def test_a_module_from_the_file_of_another_network():
    file = linear().state_dict()
    with pytest.raises(ValueError, match=r"is of another network: rule 'weight' matches nothing"):
        fp.Parametrized.from_checkpoint(nn.Sequential(nn.Linear(3, 3)), file)
    with pytest.raises(ValueError, match=r"expected float32 \(4, 3\); got float32 \(3, 3\)"):
        fp.Parametrized.from_checkpoint(nn.Linear(3, 4), file)
    norm = nn.BatchNorm1d(2)
    p = fp.parametrize(norm, {})
    given = OrderedDict(norm.state_dict(), more=torch.ones(1))
    del given["running_var"]
    with pytest.raises(ValueError, match=r"the file is of another network, which has 'more'"):
        fp.Parametrized.from_checkpoint(norm, given, p)
    del given["more"]
    with pytest.raises(ValueError, match=r"the file has no 'running_var', which the network keeps"):
        fp.Parametrized.from_checkpoint(norm, given, p)


def test_training_goes_on_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = linear(SpectralNorm())
        other = linear(SpectralNorm())
        other.load_state_dict(model.state_dict())
        other.load_state_dict(checkpoint.convert(model.state_dict(), style="torch"))
        other.load_state_dict(checkpoint.convert(model.state_dict(), style="plain"))


def headed(transform):
    model = linear(transform)
    model.head = nn.Linear(3, 2)  # beside the network
    return model


@pytest.mark.filterwarnings("ignore:values of the file")
@pytest.mark.parametrize("change", ["none", "more", "transform", "plain"])
def test_what_a_shell_has_beside_its_network_is_loaded_as_ever(change):
    source = headed(Orthogonal())
    given = source.state_dict()
    if change == "more":
        given["more"] = torch.ones(1)
    if change == "plain":
        head = {key: t for key, t in given.items() if key.startswith("head.")}
        given = {**source.fold().state_dict(), **head}
    model = headed(Orthogonal("cayley" if change == "transform" else "matrix_exp"))
    found = model.load_state_dict(given, strict=change != "more")
    assert found.missing_keys == []
    assert found.unexpected_keys == ["more"] * (change == "more")
    assert torch.equal(model.head.weight, source.head.weight)
    torch.testing.assert_close(model.values(), source.values())
