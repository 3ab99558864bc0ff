"""What looks into parametrized modules from outside: torch.ao, replicas, export, subclasses."""

import copy
import functools

import pytest
import torch
import torch.ao.nn.qat as qat
import torch.ao.quantization as quantization
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.ao.pruning._experimental.pruner import SaliencyPruner
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import funcparam.compat
from tests.compat.parts import BOTH, Double, Symmetric, api, functions
from tests.versions import words_of_213

FUNCTIONS = [functions.orthogonal, functions.weight_norm, functions.spectral_norm]


@pytest.fixture(params=["torch", "compat"])
def side(request):
    """Both implementations; compat's is installed, since torch.ao imports torch's."""
    if request.param == "compat":
        with funcparam.compat.installed():
            yield BOTH[request.param]
    else:
        yield BOTH[request.param]


def seeded(make):
    torch.manual_seed(0)
    return make()


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
class TestQuantization:
    def test_qat_linear_takes_the_parametrizations(self, side):
        register, _ = side
        layer = seeded(lambda: nn.Linear(4, 4))
        register.register_parametrization(layer, "weight", Double())
        layer.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        taken = qat.Linear.from_float(layer)
        assert register.type_before_parametrizations(taken) is qat.Linear
        assert register.is_parametrized(taken, "weight")
        assert taken.weight_fake_quant is not None
        assert torch.equal(taken.weight, layer.weight)

    @pytest.mark.filterwarnings("ignore:.*:UserWarning")
    def test_prepare_and_convert(self):
        outputs = []
        for name in BOTH:
            with funcparam.compat.installed():
                register = BOTH["compat"][0] if name == "compat" else BOTH["torch"][0]
                net = seeded(
                    lambda: nn.Sequential(
                        quantization.QuantStub(), nn.Linear(4, 4), quantization.DeQuantStub()
                    )
                )
                register.register_parametrization(net[1], "weight", Double())
            net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            ready = quantization.prepare_qat(net.train())
            ready(torch.linspace(-1, 1, 4)[None])
            quantized = quantization.convert(ready.eval())
            outputs.append(quantized(torch.linspace(-1, 1, 4)[None]))
        assert_close(outputs[1], outputs[0])

    def test_fusing_keeps_the_output(self):
        net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval())
        api.register_parametrization(net[0], "weight", Double())
        net[1].running_mean.fill_(0.3)
        x = torch.randn(1, 3, 5, 5)
        with funcparam.compat.installed():
            fused = quantization.fuse_modules(net, [["0", "1"]])
        assert isinstance(fused[1], nn.Identity)
        assert_close(fused(x), net(x))


class TestPruning:
    def test_a_sparsifier(self, side):
        register, _ = side
        net = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
        sparsifier = WeightNormSparsifier(sparsity_level=0.5)
        sparsifier.prepare(net, [{"tensor_fqn": "0.weight"}])
        mask = net[0].parametrizations.weight[0].mask
        sparsifier.step()
        assert net[0].parametrizations.weight[0].mask is mask
        assert (mask == 0).any()
        assert torch.equal(net[0].weight == 0, mask == 0)
        before = net(torch.ones(1, 8))
        sparsifier.squash_mask()
        assert type(net[0]) is nn.Linear
        assert not register.is_parametrized(net[0])
        assert torch.equal(net(torch.ones(1, 8)), before)

    def test_a_structured_pruner(self, side):
        net = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
        pruner = SaliencyPruner({})
        pruner.prepare(net, [{"tensor_fqn": "0.weight", "sparsity_level": 0.5}])
        pruner.enable_mask_update = True
        pruner.step()
        pruned = pruner.prune()
        assert pruned.get_submodule("0").weight.shape == (4, 8)


def replica(module):
    """A copy as DataParallel makes it: parameters are plain attributes, no leaves."""
    copies = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, twin in copies.items():
        for name, child in part._modules.items():
            setattr(twin, name, copies[child])
        for name, parameter in part._parameters.items():
            setattr(twin, name, None if parameter is None else parameter * 1)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                setattr(twin, name, buffer)
    return copies[module]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_replicas_of_data_parallel(function):
    layer = function(seeded(lambda: nn.Linear(4, 4, bias=False))).eval()
    x = torch.ones(2, 4)
    twin = replica(layer)
    assert_close(twin(x), layer(x))
    twin(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert_close(gradients, [parameter.grad for parameter in layer.parameters()])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_export(function):
    layer = function(seeded(lambda: nn.Linear(4, 4))).eval()
    x = torch.randn(2, 4)
    exported = torch.export.export(layer, (x,))
    assert_close(exported.module()(x), layer(x))
    assert set(exported.state_dict) == set(layer.state_dict())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_averaged_models(function):
    layer = function(seeded(lambda: nn.Linear(4, 4)))
    averaged = AveragedModel(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    averaged.update_parameters(layer)
    averaged.eval()
    before = averaged.module.weight.detach().clone()
    api.remove_parametrizations(layer, "weight")
    assert_close(averaged.module.weight.detach(), before)


class TestTensorSubclasses:
    def two(self):
        layer = nn.Linear(3, 3, bias=False)
        layer.weight = nn.Parameter(TwoTensor(torch.rand(3, 3), torch.rand(3, 3)))
        return layer

    def test_a_wrapper_stays_one(self, side):
        register, _ = side
        layer = seeded(self.two)
        before = [t.detach().clone() for t in (layer.weight.a, layer.weight.b)]
        register.register_parametrization(layer, "weight", Double())
        assert type(layer.weight) is TwoTensor
        assert_close([layer.weight.a.detach(), layer.weight.b.detach()], before)
        register.remove_parametrizations(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter)
        assert_close([layer.weight.a.detach(), layer.weight.b.detach()], before)

    @words_of_213
    def test_unwrapping_with_opaque_raw_elements(self, side):
        register, _ = side
        Factor = opaque()
        layer = nn.Linear(2, 2, bias=False)
        register.register_parametrization(layer, "weight", Unit(Factor), unsafe=True)
        held = layer.parametrizations.weight
        assert held.ntensors == 2
        assert isinstance(held.original1, Factor)
        held.original1.factor = 5.0
        assert_close(layer.weight, 5 * held.original0)
        layer.weight = torch.ones(2, 2)
        assert held.original1.factor == 1.0
        assert_close(layer.weight.detach(), torch.ones(2, 2))


@functools.cache
def opaque():
    """An object that torch takes in a graph by reference; the base class has had two names."""
    from torch._library.opaque_object import register_opaque_type

    try:
        from torch._opaque_base import OpaqueBase
    except ImportError:
        from torch._custom_class_base import CustomClassBase as OpaqueBase

    class Factor(OpaqueBase):
        def __init__(self, factor):
            self.factor = factor

    register_opaque_type(Factor, typ="reference")
    return Factor


class Unit(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.make = factor

    def forward(self, X, factor):
        return X * factor.factor

    def right_inverse(self, value):
        return value, self.make(1.0)


@pytest.fixture(params=[False, True])
def swap(request):
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("part", [Double, Symmetric, *FUNCTIONS])
def test_conversion_and_removal_with_tensors_swapped_or_not(part, swap):
    layer = seeded(lambda: nn.Linear(4, 4))
    known = layer.weight
    if part in FUNCTIONS:
        part(layer)
    else:
        api.register_parametrization(layer, "weight", part())
    expected = layer.eval().weight.detach().double()
    raw = dict(layer.named_parameters())
    layer.double()
    assert dict(layer.named_parameters()).keys() == raw.keys()
    assert all(x is raw[name] for name, x in layer.named_parameters())
    assert_close(layer.weight.detach(), expected, atol=1e-5, rtol=1e-5)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    api.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert_close(layer.weight.detach(), expected, atol=1e-5, rtol=1e-5)
    assert swap or layer.weight is known


def test_a_lazy_module_once_it_has_shapes():
    layer = nn.LazyLinear(3)
    layer(torch.ones(1, 4))
    functions.orthogonal(layer)
    assert layer(torch.ones(1, 4)).shape == (1, 3)
    assert api.type_before_parametrizations(layer) is nn.Linear


@pytest.mark.parametrize("function", FUNCTIONS)
def test_meta_modules_materialize_and_train(function):
    with torch.device("meta"):
        layer = function(nn.Linear(4, 4))
    assert layer(torch.ones(1, 4, device="meta")).shape == (1, 4)
    real = function(seeded(lambda: nn.Linear(4, 4)))
    layer.to_empty(device="cpu")
    layer.load_state_dict(real.state_dict())
    assert_close(layer.eval().weight, real.eval().weight)
    layer.train()(torch.ones(1, 4)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_ensemble_of_stacked_layers_trains(function):
    layers = [function(nn.Linear(4, 4)) for _ in range(3)]
    raw, buffers = stack_module_state(layers)
    x = torch.randn(2, 4)

    def loss(raw, buffers):
        return functional_call(layers[0], (raw, buffers), (x,)).square().sum()

    together = vmap(grad(loss))(raw, buffers)
    for i, layer in enumerate(layers):
        one = {name: tensor[i] for name, tensor in raw.items()}
        alone = grad(loss)(one, {name: b.detach().clone() for name, b in layer.named_buffers()})
        for name, gradient in alone.items():
            assert_close(together[name][i], gradient, atol=1e-5, rtol=1e-5)
