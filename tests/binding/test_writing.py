"""What a method of the network, or a block, writes to a weight with a rule goes to its raw."""

import copy

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import (
    Frozen,
    Identity,
    LoRA,
    Mask,
    Orthogonal,
    Positive,
    RotateIn,
    SpectralNorm,
    UnitNorm,
    WeightNorm,
)
from tests.networks import Tied

X = torch.ones(2, 4)


def shell(rules, net=None, **options):
    torch.manual_seed(0)
    net = net or nn.Linear(4, 4)
    return fp.Parametrized(net, fp.parametrize(net, rules), **options)


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


TRANSFORMS = [
    *(Frozen(), Identity(), LoRA(2), Mask(), Orthogonal(), SpectralNorm(), UnitNorm()),
    WeightNorm(),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_reset_parameters(transform, training):
    model = shell({"weight": transform}).train(training)
    raw = {name: id(tensor) for name, tensor in model.named_parameters()}
    torch.manual_seed(1)
    plain = nn.Linear(4, 4)
    expected = model.parametrization(*model.parametrization.init(plain))
    torch.manual_seed(1)
    model.reset_parameters()
    torch.testing.assert_close(model.values(), expected)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == raw
    assert all(t.requires_grad for n, t in model.named_parameters() if n.startswith("raw"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_large_values_which_are_made_when_they_are_read(recompute, grad):
    net = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    model = shell({"*.weight": WeightNorm()}, net, recompute=recompute)
    before, new = model.values(), torch.randn(512, 512)
    with torch.set_grad_enabled(grad), model.bound() as inside:
        with torch.no_grad():
            inside[0].weight.copy_(new)
        assert inside[1].weight.shape == new.shape  # which drops the other value
        torch.testing.assert_close(inside[0].weight, new)
    torch.testing.assert_close(model.values(), {**before, "0.weight": new})


def test_another_tensor_in_its_place():
    for size in (4, 512):
        net = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
        model = shell({"*.weight": WeightNorm()}, net)
        new = nn.Parameter(torch.randn(size, size))
        with torch.no_grad(), model.bound() as inside:
            inside[0].weight = new
        torch.testing.assert_close(model.values()["0.weight"], new)
        assert model.net[0].weight is None


def test_ties_and_what_takes_another():
    model = shell({"decoder.weight": WeightNorm()}, Tied())
    with model.bound() as net:
        nn.init.normal_(net.decoder.weight)
        new = net.decoder.weight.clone()
    values = model.values()
    torch.testing.assert_close([values[n] for n in ("encoder.weight", "decoder.weight")], [new] * 2)
    net = nn.Linear(4, 4, bias=False)
    net.R = nn.Parameter(torch.eye(4))
    model = shell({"R": Orthogonal(), "weight": RotateIn("R")}, net)
    with torch.no_grad():
        model.raw.R.normal_()
    before = model.values()["R"]
    new = torch.randn(4, 4)
    with torch.no_grad(), model.bound() as inside:
        inside.weight.copy_(new)
    torch.testing.assert_close(model.values(), {"weight": new, "R": before})


def test_all_or_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for linear in net:
        nn.init.uniform_(linear.weight, 0.5, 1)
    model = shell({"0.weight": WeightNorm(), "1.weight": Positive()}, net)
    before = tensors(model)

    def minus(inside):
        nn.init.ones_(inside[0].weight)
        nn.init.constant_(inside[1].weight, -1.0)

    def nan(inside):
        nn.init.constant_(inside[0].weight, float("nan"))

    def shape(inside):
        nn.init.ones_(inside[0].weight)
        inside[1].weight = nn.Parameter(torch.ones(3, 3))

    def none(inside):
        nn.init.ones_(inside[0].weight)
        inside[1].weight = None

    def fails(inside):
        nn.init.ones_(inside[0].weight)
        raise ValueError("mine")

    for write, message in [
        (minus, r"'1.weight': Positive.*every entry to be positive"),
        (nan, r"'0.weight'.*finite"),
        (shape, r"'1.weight': expected float32 \(4, 4\); got float32 \(3, 3\)"),
        (none, r"'1.weight' of this Parametrized's network was written to"),
        (fails, "^mine$"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message), model.bound() as inside:
            write(inside)
        torch.testing.assert_close(tensors(model), before, rtol=0, atol=0)
        assert model.net[1].weight is None


class Halved(nn.Linear):
    def halved(self, x):
        self.weight.mul_(0.5)
        return self(x)


def test_what_is_differentiated_is_no_write():
    model = shell({"weight": WeightNorm()}, Halved(4, 4))
    before = tensors(model)
    loss = model.halved(X).square().sum()
    torch.testing.assert_close(tensors(model), before, rtol=0, atol=0)
    loss.backward()
    plain = model.fold()
    assert plain.weight.grad is None
    with torch.no_grad():
        model.halved(X)
    torch.testing.assert_close(model.values()["weight"], plain.weight / 2)


def test_what_evolves_fits_what_was_written():
    model = shell({"weight": SpectralNorm()}).train()
    with model.bound() as net:
        nn.init.orthogonal_(net.weight, gain=1.0)
        new = net.weight.clone()
    assert torch.linalg.matrix_norm(model.values()["weight"], 2) <= 1 + 1e-5
    torch.testing.assert_close(model.values()["weight"], new)


def test_copies_go_their_own_way():
    model = shell({"weight": Orthogonal()})
    other = copy.deepcopy(model)
    before = tensors(other)
    model.reset_parameters()
    torch.testing.assert_close(tensors(other), before, rtol=0, atol=0)


def positive(size=400, tied=False):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(3)))
    for linear in net:
        nn.init.uniform_(linear.weight, 0.1, 1)
    if tied:
        net[2].weight = net[0].weight
    return fp.Parametrized(net, fp.parametrize(net, {"*.weight": Positive()}))


def into(model, write):
    with torch.no_grad(), model.bound() as net:
        write(net)


def means(model):
    return [value.mean().item() for value in model.values().values()]


def test_a_large_value_that_was_dropped_is_not_written_in_vain():
    model = positive()
    with torch.no_grad(), model.bound() as net:
        for weight in net.parameters():
            weight.fill_(2.0)
    assert means(model) == pytest.approx([2.0] * 3)
    before = tensors(model)
    message = "'0.weight' was written to after the network had read another weight"
    with pytest.raises(RuntimeError, match=message):
        into(model, lambda net: [weight.fill_(3.0) for weight in list(net.parameters())])
    torch.testing.assert_close(tensors(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [4, 400])
def test_in_inference_mode(size):
    model = positive(size)
    with torch.inference_mode(), model.bound() as net:
        net[0].weight.fill_(2.0)
        assert net[1](torch.ones(1, size)).is_inference()
    assert means(model)[0] == pytest.approx(2.0)


@pytest.mark.parametrize("size", [4, 400])
def test_a_tie_is_replaced_whole(size):
    model = positive(size, tied=True)
    before = tensors(model)
    new = nn.Parameter(torch.full((size, size), 5.0))
    for i in (0, 2):
        message = "'0.weight' .* written to in one of its places, and not in the others"
        with pytest.raises(RuntimeError, match=message):
            into(model, lambda net, i=i: setattr(net[i], "weight", new))
        torch.testing.assert_close(tensors(model), before, rtol=0, atol=0)
    with torch.no_grad(), model.bound() as net:
        net[0].weight = net[2].weight = new
    assert model.values()["2.weight"].mean().item() == pytest.approx(5.0)


def test_blocks_in_blocks_agree_or_say_so():
    model = positive(4)
    before = tensors(model)
    x = torch.ones(1, 4)
    with torch.no_grad(), model.bound() as net:
        torch.testing.assert_close(model(x), net(x))
    message = "'0.weight' was written to in a block around this one"
    with pytest.raises(RuntimeError, match=message):
        into(model, lambda net: [net[0].weight.fill_(2.0), model(x)])
    message = "'0.weight' was written to in a block inside of another one"
    with pytest.raises(RuntimeError, match=message):
        into(model, lambda _: into(model, lambda net: net[0].weight.fill_(2.0)))
    torch.testing.assert_close(tensors(model), before, rtol=0, atol=0)
