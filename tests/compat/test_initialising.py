"""Initialising what is computed: `torch.nn.init` under an installation, and `reset_parameters`."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import init
from torch.testing import assert_close

import funcparam.compat
from funcparam.transforms import Positive, SpectralNorm
from tests.compat.parts import Double, Scaled, Symmetric, api, functions


def linear(*shape, **options):
    torch.manual_seed(0)
    return nn.Linear(*(shape or (4, 4)), **options)


@pytest.fixture
def install():
    with funcparam.compat.installed():
        yield


def orthogonality(W):
    return (W.mT @ W - torch.eye(W.shape[1])).abs().max().item()


INITIALISE = [
    lambda W: init.orthogonal_(W),
    lambda W: init.kaiming_uniform_(W, a=5**0.5),
    lambda W: init.xavier_normal_(tensor=W),
    lambda W: init.constant_(W, 0.5),
    lambda W: init.trunc_normal_(W),
    lambda W: init.eye_(W),
    lambda W: init.normal_(W, 1.0, 0.1),
]


@pytest.mark.usefixtures("install")
@pytest.mark.parametrize("initialise", INITIALISE)
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_drawn_is_the_weight(initialise, grad):
    layer, plain = functions.weight_norm(linear()), linear()
    for module in (layer, plain):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            initialise(module.weight)
    assert_close(layer.weight.detach(), plain.weight.detach())


@pytest.mark.usefixtures("install")
def test_an_orthogonal_weight_takes_the_nearest_and_a_given_one_exactly():
    layer = functions.orthogonal(linear())
    drawn = init.orthogonal_(layer.weight)
    assert_close(layer.weight.detach(), drawn.detach(), atol=1e-6, rtol=0)
    init.normal_(layer.weight)
    assert orthogonality(layer.weight.detach()) < 1e-5


@pytest.mark.usefixtures("install")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["function", "transform", "convolution"])
@pytest.mark.parametrize("reset", [True, False])
def test_spectral_norm_is_right_at_once(kind, training, reset):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3) if kind == "convolution" else nn.Linear(6, 6)
    if kind == "transform":
        api.register_parametrization(layer, "weight", SpectralNorm())
    else:
        functions.spectral_norm(layer)
    layer.train(training)
    u = next(layer.buffers())
    if reset:
        layer.reset_parameters()
    else:
        init.normal_(layer.weight)
    W = layer.eval().weight.detach()
    W = W.movedim(1, 0).flatten(1) if kind == "convolution" else W
    assert torch.linalg.matrix_norm(W, 2).item() == pytest.approx(1, abs=1e-4)
    assert (next(layer.buffers()) is u) == (kind != "transform")


@pytest.mark.usefixtures("install")
def test_a_network_is_initialised_by_apply():
    net = nn.Sequential(functions.weight_norm(linear()), nn.ReLU(), functions.weight_norm(linear()))

    def weights(module):
        if isinstance(module, nn.Linear):
            init.constant_(module.weight, 0.5)
            init.zeros_(module.bias)

    net.apply(weights)
    for layer in (net[0], net[2]):
        assert_close(layer.weight.detach(), torch.full((4, 4), 0.5))


@pytest.mark.usefixtures("install")
def test_a_chain_and_parts_with_parameters():
    layer = linear().double()
    api.register_parametrization(layer, "weight", Scaled())
    functions.spectral_norm(layer)
    init.eye_(layer.weight)
    assert_close(layer.eval().weight.detach(), torch.eye(4).double(), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("install")
def test_reading_first_and_initialising_later():
    layer, other = (api.register_parametrization(linear(), "weight", Double()) for _ in range(2))
    first, second = layer.weight, other.weight
    init.ones_(second)
    assert_close(other.weight.detach(), torch.ones(4, 4))
    init.zeros_(first)
    assert not layer.weight.any()
    assert_close(other.weight.detach(), torch.ones(4, 4))


@pytest.mark.usefixtures("install")
def test_copies_and_plain_tensors_are_nobodys():
    layer = api.register_parametrization(linear(), "weight", Double())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        for tensor in (layer.weight.clone(), copy.deepcopy(layer.weight), layer.weight.detach()):
            init.zeros_(tensor)
        init.zeros_(torch.empty(3))
    assert_close(layer.weight.detach(), before)


@pytest.mark.usefixtures("install")
def test_what_was_read_can_be_saved(tmp_path):
    layer = api.register_parametrization(linear(), "weight", Double())
    with torch.no_grad():
        torch.save(layer.weight, tmp_path / "weight")
    loaded = torch.load(tmp_path / "weight", weights_only=True)
    assert vars(loaded) == {}
    assert torch.equal(loaded, layer.weight)


@pytest.mark.usefixtures("install")
def test_readings_are_forgotten_with_the_values():
    from funcparam.compat._readings import READINGS

    layer = api.register_parametrization(linear(), "weight", Double())
    gc.collect()
    before = len(READINGS._known)
    values = [layer.weight for _ in range(5)]
    assert len(READINGS._known) == before + 5
    del values
    assert len(READINGS._known) == before


@pytest.mark.usefixtures("install")
def test_raw_that_is_the_value_can_be_swapped():
    layer = api.register_parametrization(linear(), "weight", nn.Identity())
    init.ones_(layer.weight)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_close(layer.weight.detach(), torch.ones(4, 4).double())


@pytest.mark.usefixtures("install")
@pytest.mark.parametrize("initialise", [lambda m: init.ones_(m.weight), nn.Linear.reset_parameters])
def test_what_has_no_right_inverse_says_so_and_stays_as_it_was(initialise):
    layer = api.register_parametrization(linear(), "weight", Symmetric())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="does not implement right_inverse"):
        initialise(layer) if initialise is not nn.Linear.reset_parameters else (
            layer.reset_parameters()
        )
    assert_close(layer.state_dict(), before)


@pytest.mark.usefixtures("install")
def test_what_does_not_fit_says_so_and_stays_as_it_was():
    layer = api.register_parametrization(linear(), "weight", torch.exp)
    api.register_parametrization(layer, "bias", torch.exp)
    positive = nn.Linear(4, 4)
    init.ones_(positive.weight)
    api.register_parametrization(positive, "weight", Positive())
    before = positive.weight.detach().clone()
    with pytest.raises(ValueError, match="positive"):
        init.constant_(positive.weight, -1.0)
    assert torch.equal(positive.weight, before)


@pytest.mark.usefixtures("install")
def test_inside_of_functional_call_the_given_value_is_initialised():
    class Reset(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = api.register_parametrization(linear(), "weight", Double())

        def forward(self):
            init.ones_(self.layer.weight)

    net, W = Reset(), torch.zeros(4, 4)
    before = net.layer.weight.detach().clone()
    torch.func.functional_call(net, {"layer.weight": W}, ())
    assert torch.equal(W, torch.ones(4, 4))
    assert torch.equal(net.layer.weight, before)


@pytest.mark.usefixtures("install")
def test_in_a_compiled_function():
    layer = api.register_parametrization(linear(), "weight", Double())

    @torch.compile(backend="eager")
    def fresh(x):
        return init.ones_(torch.empty_like(x)) + layer.weight

    assert_close(fresh(torch.zeros(4, 4)), 1 + layer.weight)


@pytest.mark.parametrize("name", ["orthogonal", "weight_norm"])
def test_what_torch_parametrized_before_is_initialised_too(name):
    layer = getattr(nn.utils.parametrizations, name)(linear())
    with funcparam.compat.installed():
        api.register_parametrization(layer, "bias", Double())  # now it is compat's too
        drawn = init.orthogonal_(layer.weight).detach().clone()
    assert_close(layer.weight.detach(), drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "spectral_norm"])
def test_what_transformers_has_loaded_is_not_initialised(kind):
    """`from_pretrained` marks raw, and then initialises every tensor without a mark."""
    layer = getattr(functions, kind)(nn.Linear(3, 3))
    held = layer.parametrizations.weight
    before = copy.deepcopy(layer.state_dict())
    for raw in held.parameters():
        raw._is_hf_initialized = True
    with funcparam.compat.installed():
        layer.eval()
        init.normal_(layer.weight)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        for raw in held.parameters():
            del raw._is_hf_initialized
        init.zeros_(layer.bias)
        init.eye_(layer.weight)
    assert_close(layer.weight.detach(), torch.eye(3))


def test_the_functions_of_init_are_torchs_again_afterwards():
    before = dict(vars(init))
    with funcparam.compat.installed():
        assert init.ones_ is not before["ones_"]
        assert init.ones_.__name__ == "ones_"
        inside = functions.weight_norm(linear())
        value = inside.weight
    assert dict(vars(init)) == before
    init.ones_(value)
    assert not torch.equal(inside.weight, torch.ones(4, 4))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))
        self.plain = nn.Parameter(torch.randn(3))

    def reset_parameters(self):
        for weight in (self.plain, self.first, self.second):
            init.normal_(weight)


@pytest.mark.parametrize(
    "make", [Two, lambda: nn.Linear(4, 4), lambda: nn.MultiheadAttention(4, 2)]
)
def test_a_reset_that_fails_leaves_everything_as_it_was(make, monkeypatch):
    torch.manual_seed(0)
    module = make()
    for weight in [n for n, p in module.named_parameters(recurse=False) if p.ndim == 2]:
        functions.orthogonal(module, weight)
    before = copy.deepcopy(module.state_dict())
    reset = getattr(module, "reset_parameters", None) or module._reset_parameters
    calls = []

    def failing(self, value):
        calls.append(value)
        if len(calls) == len(list(module.parametrizations)):
            raise RuntimeError("broken")
        return right_inverse(self, value)

    right_inverse = functions._Orthogonal.right_inverse
    with monkeypatch.context() as patch:
        patch.setattr(functions._Orthogonal, "right_inverse", failing)
        with pytest.raises(RuntimeError, match="broken"):
            reset()
    assert_close(dict(module.state_dict()), dict(before), atol=0, rtol=0)
    assert not any(key.startswith("_funcparam") for key in vars(module))
    reset()
    changed = [
        not torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), before.values(), strict=True)
    ]
    assert any(changed)
