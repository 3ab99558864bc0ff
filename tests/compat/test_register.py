"""Registering and removing: structure, identities, texts, and all or nothing."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_functions
from torch.testing import assert_close

import funcparam as fp
from funcparam.transforms import (
    Chain,
    Identity,
    Interval,
    LoRA,
    Mask,
    Orthogonal,
    Positive,
    SpectralNorm,
    WeightNorm,
)
from funcparam.transforms import Symmetric as SymmetricTransform
from tests.compat.parts import BOTH, Double, Factors, Sum, Symmetric, api, functions, torch_api
from tests.versions import words_of_213


def linear(*shape, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Linear(*(shape or (3, 3)), **kwargs)


class Slotted(nn.Linear):
    __slots__ = ("note",)


def test_copies_keep_what_is_in_slots():
    layer = api.register_parametrization(Slotted(2, 2), "weight", Symmetric())
    layer.note = [1]
    twin = copy.deepcopy(layer)
    assert twin.note == [1]
    assert twin.note is not layer.note


def test_the_attribute_is_computed_and_the_parameter_stays_the_same_object():
    layer = linear()
    weight, before = layer.weight, layer.weight.detach().clone()
    assert api.register_parametrization(layer, "weight", Double()) is layer
    assert layer.parametrizations.weight.original is weight
    assert_close(layer.weight, before)
    assert_close(weight.detach(), before / 2)
    assert "weight" not in dict(layer.named_parameters())
    assert api.remove_parametrizations(layer, "weight") is layer
    assert layer.weight is weight
    assert type(layer) is nn.Linear
    assert not hasattr(layer, "parametrizations")
    assert_close(weight.detach(), before)


def test_leaving_the_raw_tensor():
    layer = linear()
    weight, before = layer.weight, layer.weight.detach().clone()
    api.register_parametrization(layer, "weight", Symmetric())
    api.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert layer.weight is weight
    assert torch.equal(weight, before)


def test_a_chain_is_applied_in_order_and_inverted_in_reverse():
    layer = linear()
    api.register_parametrization(layer, "weight", Double())
    api.register_parametrization(layer, "weight", torch.exp, unsafe=True)
    held = layer.parametrizations.weight
    assert_close(layer.weight, (2 * held.original).exp())
    assert len(held) == 2
    assert held.unsafe
    layer = linear()
    for _ in range(2):
        api.register_parametrization(layer, "weight", Double())
    layer.weight = torch.full((3, 3), 8.0)
    assert_close(layer.parametrizations.weight.original.detach(), torch.full((3, 3), 2.0))


@pytest.mark.parametrize("part", [Sum, Factors])
def test_several_raw_tensors(part):
    layer = linear()
    weight = layer.weight
    api.register_parametrization(layer, "weight", part())
    held = layer.parametrizations.weight
    assert not held.is_tensor
    assert held.ntensors == 2
    assert (held.original0 is weight) == (part is Sum)
    value = held(*()).detach().clone()
    layer.weight = value
    assert_close(layer.weight, value)
    with pytest.raises(ValueError, match="parametrized in terms of a sequence"):
        api.remove_parametrizations(layer, "weight", leave_parametrized=False)
    api.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    assert_close(layer.weight.detach(), value)


def test_a_buffer_stays_a_buffer():
    layer = linear()
    layer.register_buffer("scale", torch.ones(2))
    api.register_parametrization(layer, "scale", Double())
    assert "parametrizations.scale.original" in dict(layer.named_buffers())
    assert_close(layer.scale, torch.ones(2))
    api.remove_parametrizations(layer, "scale")
    assert "scale" in dict(layer.named_buffers())


def test_unsafe_lets_shape_and_dtype_change():
    layer = linear(2, 3)
    api.register_parametrization(layer, "weight", torch.Tensor.double, unsafe=True)
    assert layer.weight.dtype == torch.float64
    api.register_parametrization(layer, "bias", lambda x: torch.cat([x, x]), unsafe=True)
    assert layer.bias.shape == (6,)


@pytest.mark.parametrize("unsafe", [True, False])
def test_registering_reads_as_often_as_torch(unsafe):
    """A read may be a step, as of power iteration."""

    class Counted(Double):
        reads = 0

        def forward(self, X):
            self.reads += 1
            return super().forward(X)

    counts = []
    for register, _ in BOTH.values():
        layer, first, second = nn.Linear(3, 3), Counted(), Counted()
        for part in (first, second):
            register.register_parametrization(layer, "weight", part, unsafe=unsafe)
        counts.append((first.reads, second.reads))
    assert counts[0] == counts[1]


def test_training_mode_is_the_modules():
    part = Double()
    api.register_parametrization(linear().eval(), "weight", part)
    assert not part.training


def test_names_move_the_module_between_shared_classes():
    a, b = linear(), linear()
    api.register_parametrization(a, "weight", Double())
    only_weight = type(a)
    assert only_weight.__bases__[0] is nn.Linear
    assert only_weight.__name__ == "ParametrizedLinear"
    api.register_parametrization(a, "bias", Double())
    assert type(a) is not only_weight
    assert type(a).__bases__[0] is nn.Linear
    api.register_parametrization(b, "bias", Double())
    api.register_parametrization(b, "weight", Double())
    assert type(a) is type(b)
    api.remove_parametrizations(a, "bias")
    assert type(a) is only_weight
    assert api.type_before_parametrizations(a) is nn.Linear
    assert api.type_before_parametrizations(linear()) is nn.Linear
    assert api.is_parametrized(a)
    assert api.is_parametrized(a, "weight")
    assert not api.is_parametrized(a, "bias")


def test_keys_and_load_are_torchs():
    states = []
    for _, functions_ in BOTH.values():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        for layer, name in zip(net, ("orthogonal", "weight_norm", "spectral_norm"), strict=True):
            getattr(functions_, name)(layer)
        states.append((net, net.state_dict()))
    (theirs, a), (ours, b) = states
    assert list(a) == list(b)
    x = torch.randn(5, 3)
    theirs.eval()
    ours.eval()
    ours.load_state_dict(a)
    assert_close(ours(x), theirs(x))
    theirs.load_state_dict(b)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("map_", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("trivial", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_orthogonal_checkpoints_go_both_ways(map_, trivial, shape):
    layers = []
    for _, functions_ in BOTH.values():
        layer = linear(*shape)
        functions_.orthogonal(layer, "weight", map_, use_trivialization=trivial)
        layers.append(layer)
    theirs, ours = layers
    assert_close(ours.weight, theirs.weight, atol=1e-5, rtol=0)
    with torch.no_grad():
        theirs.parametrizations.weight.original.add_(torch.randn(shape[::-1]).tril(-1))
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.weight, theirs.weight, atol=1e-5, rtol=0)


def test_transfer_shares_parts_and_raw():
    source, target = linear(), linear(seed=1)
    api.register_parametrization(source, "weight", Double())
    api.register_parametrization(source, "bias", Sum())
    api.transfer_parametrizations_and_params(source, target)
    assert target.parametrizations.weight[0] is source.parametrizations.weight[0]
    assert target.parametrizations.weight.original is source.parametrizations.weight.original
    assert target.parametrizations.bias.original1 is source.parametrizations.bias.original1
    single = linear(seed=2)
    api.transfer_parametrizations_and_params(source, single, "bias")
    assert list(single.parametrizations) == ["bias"]
    empty = nn.Module()
    api.transfer_parametrizations_and_params(source, empty)
    assert_close(empty.weight, source.weight)
    assert api.transfer_parametrizations_and_params(linear(), single) is single


@pytest.mark.parametrize(
    "transform",
    [
        SymmetricTransform(),
        Orthogonal(),
        SpectralNorm(),
        WeightNorm(),
        Chain(Orthogonal(), Orthogonal("cayley")),
    ],
    ids=str,
)
def test_funcparam_transforms_are_parametrizations(transform):
    layer = linear()
    api.register_parametrization(layer, "weight", transform)
    raw, state = transform.right_inverse(linear().weight.detach())
    expected = transform.forward(raw, transform.update(raw, state))
    assert_close(layer.weight.detach(), expected, atol=1e-5, rtol=1e-4)
    layer.weight = layer.weight.detach().clone()
    assert_close(layer.weight.detach(), expected, atol=1e-4, rtol=1e-4)
    layer(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    twin = linear(seed=1)
    api.register_parametrization(twin, "weight", transform)
    twin.load_state_dict(layer.state_dict())
    assert_close(twin.eval().weight, layer.eval().weight)


@pytest.mark.parametrize(
    "transform",
    [
        Mask(),
        Interval(-9, 9),
        Orthogonal(),
        Orthogonal("qr"),
        SpectralNorm(),
        SymmetricTransform(),
    ],
    ids=repr,
)
def test_transforms_come_after_others_with_the_state_that_they_need(transform):
    layer = linear()
    first = api.register_parametrization(layer, "weight", SymmetricTransform()).weight.detach()
    _, state = transform.right_inverse(first)
    api.register_parametrization(layer, "weight", transform)
    assert_close(layer.weight, transform.forward(first, state))
    again = linear()
    for part in (SymmetricTransform(), transform):
        api.register_parametrization(again, "weight", part)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval().weight, layer.eval().weight)


def test_a_transform_without_state_comes_after_any_value():
    layer = api.register_parametrization(linear(), "weight", SymmetricTransform())
    before = layer.weight.detach()
    api.register_parametrization(layer, "weight", Positive())
    assert_close(layer.weight, torch.nn.functional.softplus(before))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            WeightNorm(),
            r"^WeightNorm\(dim=0\) has several raw tensors \(magnitude, direction\), so it",
        ),
        (LoRA(1), r"has several raw tensors \(A, B\), so it can only come first"),
        (
            SymmetricTransform(),
            r"Symmetric\(\) expects a square matrix or a batch of them; got shape \(2, 3",
        ),
        (Interval(0, 1), "Interval.* expects every entry strictly between 0 and 1; got"),
    ],
    ids=lambda x: repr(x) if not isinstance(x, str) else "",
)
def test_what_cannot_come_after_others_says_why(transform, message):
    layer = api.register_parametrization(nn.Linear(3, 2), "weight", Identity())
    layer.weight = torch.full((2, 3), -2.0)
    before = layer.state_dict()
    with pytest.raises(ValueError, match=message):
        api.register_parametrization(layer, "weight", transform)
    assert layer.state_dict().keys() == before.keys()
    assert torch.equal(layer.weight, torch.full((2, 3), -2.0))


def test_functions_are_parametrizations():
    layer = linear()
    api.register_parametrization(layer, "weight", torch.tanh)
    assert "tanh" in repr(layer)
    with pytest.raises(NotImplementedError, match="has no right_inverse"):
        layer.weight = torch.zeros(3, 3)
    scaled = fp.transform(lambda raw: 10 * raw, lambda value: value / 10)
    layer = api.register_parametrization(linear(), "weight", scaled)
    assert_close(layer.weight, linear().weight)
    with pytest.raises(TypeError, match=r"got <class .*call it first"):
        api.register_parametrization(linear(), "weight", Double)
    with pytest.raises(TypeError, match="expected to be an nn.Module"):
        api.register_parametrization(linear(), "weight", 3)


class Returns(nn.Module):
    """Gives back what it was told to."""

    def __init__(self, out=None, back=None):
        super().__init__()
        self.out, self.back = out, back

    def forward(self, *X):
        return X[0] if self.out is None else self.out(X[0])

    def right_inverse(self, value):
        return value if self.back is None else self.back(value)


FIRST = {
    "out a number": Returns(out=lambda X: 1),
    "out other dtype": Returns(out=lambda X: X.double()),
    "out other shape": Returns(out=lambda X: X[:1]),
    "back a number": Returns(back=lambda X: 1),
    "back of numbers": Returns(back=lambda X: (X, 1)),
    "back other dtype": Returns(back=lambda X: X.double()),
    "back other device": Returns(back=lambda X: X.to("meta")),
}


@words_of_213
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", FIRST)
def test_errors_are_torchs_word_for_word(kind, second):
    texts = []
    for register in (torch_api, api):
        layer = linear()
        if second:
            register.register_parametrization(layer, "weight", Double())
        try:
            register.register_parametrization(layer, "weight", copy.deepcopy(FIRST[kind]))
        except ValueError as error:
            texts.append(str(error))
        else:
            texts.append(None)
    assert texts[0] == texts[1]


def assign(layer, register):
    class Fickle(Returns):
        pass

    part = Fickle()
    register.register_parametrization(layer, "weight", part)
    return part


@pytest.mark.parametrize("back", [lambda X: 1, lambda X: X.double()], ids=["number", "dtype"])
def test_errors_of_assigning_are_torchs(back):
    texts = []
    for register in (torch_api, api):
        layer = linear()
        assign(layer, register).back = back
        with pytest.raises(ValueError) as error:  # noqa: PT011
            layer.weight = torch.ones(3, 3)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


@words_of_213
@pytest.mark.parametrize(
    "back", [lambda X: 1, lambda X: (X,), lambda X: (X, 1), lambda X: (X, X.double())]
)
def test_errors_of_assigning_several_are_torchs(back):
    texts = []
    for register in (torch_api, api):
        layer = linear()
        part = Returns(back=lambda X: (X, X))
        register.register_parametrization(layer, "weight", part)
        part.back = back
        with pytest.raises(ValueError) as error:  # noqa: PT011
            layer.weight = torch.ones(3, 3)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def calls(register, functions_):
    """Wrong calls, and the errors that they raise."""
    parametrized = linear(3, 4)
    functions_.orthogonal(parametrized)
    symmetric = linear()
    register.register_parametrization(symmetric, "weight", Symmetric())
    yield lambda: register.register_parametrization(linear(), "nothing", Double())
    yield lambda: register.remove_parametrizations(linear(), "weight")
    yield lambda: register.ParametrizationList([], torch.ones(2))
    yield lambda: setattr(symmetric, "weight", torch.ones(3, 3))
    yield lambda: pickle.dumps(symmetric)
    yield lambda: setattr(parametrized, "weight", torch.ones(5, 5))
    yield lambda: functions_.orthogonal(linear(), "nothing")
    yield lambda: functions_.orthogonal(linear(), "bias")
    yield lambda: functions_.orthogonal(linear(), orthogonal_map="qr")
    yield lambda: functions_.orthogonal(linear(dtype=torch.complex64), "weight", "householder")
    for map_ in ("matrix_exp", "cayley"):
        layer = functions_.orthogonal(linear(), "weight", map_, use_trivialization=False)
        yield lambda layer=layer: setattr(layer, "weight", torch.eye(3))
    yield lambda: functions_.spectral_norm(linear(), "nothing")
    yield lambda: functions_.spectral_norm(linear(), dim=4)
    yield lambda: functions_.spectral_norm(linear(), n_power_iterations=0)


def test_errors_of_wrong_calls_are_torchs():
    theirs, ours = (list(calls(*pair)) for pair in BOTH.values())
    for a, b in zip(theirs, ours, strict=True):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            a()
        with pytest.raises(type(expected.value)) as error:
            b()
        assert str(error.value) == str(expected.value)


@pytest.mark.parametrize(
    "function", [functions.orthogonal, functions.weight_norm, functions.spectral_norm]
)
def test_a_lazy_tensor_is_refused_with_what_to_do(function):
    with pytest.raises(ValueError, match="run a batch through the lazy module"):
        function(nn.LazyLinear(3))


def test_the_load_hook_of_weight_norm_goes_with_it():
    layer = functions.weight_norm(linear())
    old = {"weight_g": torch.ones(3, 1), "weight_v": torch.eye(3), "bias": torch.zeros(3)}
    layer.load_state_dict(old)
    assert_close(layer.weight.detach(), torch.eye(3))
    net = nn.Sequential(functions.weight_norm(linear()))
    net.load_state_dict({f"0.{key}": tensor for key, tensor in old.items()})
    assert_close(net[0].weight.detach(), torch.eye(3))
    api.remove_parametrizations(layer, "weight")
    with pytest.raises(RuntimeError, match="weight_g"):
        layer.load_state_dict(old)
    assert_close(pickle.loads(pickle.dumps(layer)).weight, layer.weight)


@pytest.mark.parametrize("dim", [0, 1, None, -1])
def test_weight_norm_equals_torchs(dim):
    theirs, ours = (getattr(f, "weight_norm")(linear(3, 4), dim=dim) for _, f in BOTH.values())  # noqa: B009
    for i in "01":
        a, b = (getattr(m.parametrizations.weight, f"original{i}") for m in (theirs, ours))
        assert_close(a, b)
    assert_close(theirs.weight, ours.weight)
    assert torch_functions.weight_norm is not functions.weight_norm


@pytest.mark.parametrize("swap", [False, True])
def test_identity_is_kept_when_tensors_are_swapped(swap):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer = linear()
        weight = layer.weight
        api.register_parametrization(layer, "weight", Double())
        layer.weight = torch.ones(3, 3)
        assert layer.parametrizations.weight.original is weight
        api.remove_parametrizations(layer, "weight")
        assert layer.weight is weight
        assert_close(weight.detach(), torch.ones(3, 3))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_part_that_holds_the_module_that_it_parametrizes():
    class Host(nn.Module):
        def __init__(self, host):
            super().__init__()
            self.host = host

        def forward(self, X):
            return 2 * X

    layer = nn.Linear(2, 2)
    value = 2 * layer.weight.detach()
    api.register_parametrization(layer, "weight", Host(layer))
    with api.cached():
        assert layer.weight is layer.weight
    api.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, value)
