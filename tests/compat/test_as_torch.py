"""Where an older compat was cleverer than torch and wrong: each script gives what torch's gives."""

import copy
import threading
from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import normalize
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from funcparam.transforms import SpectralNorm, Symmetric
from tests.compat.parts import BOTH, Double, api, functions


@pytest.fixture(params=BOTH)
def side(request):
    return BOTH[request.param]


def linear(*shape, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(*(shape or (4, 4)), **options)


def norm(layer):
    return torch.linalg.matrix_norm(layer.eval().weight, 2).item()


def test_soft_updates_through_data_are_followed(side):
    _, functions = side
    online = functions.spectral_norm(linear(16, 16))
    target = copy.deepcopy(online)
    optimizer = torch.optim.SGD(online.parameters(), 1.0)
    for _ in range(60):
        optimizer.zero_grad()
        online(torch.randn(8, 16)).square().mean().neg().backward()
        optimizer.step()
        for p, q in zip(target.parameters(), online.parameters(), strict=True):
            p.data.mul_(0.9).add_(q.data, alpha=0.1)
        with torch.no_grad():
            target(torch.randn(8, 16))
    assert norm(target) == pytest.approx(1, abs=0.01)


def test_noise_through_data_is_followed(side):
    _, functions = side
    layer = functions.spectral_norm(linear(8, 8))
    for _ in range(60):
        layer.parametrizations.weight.original.data.add_(0.1 * torch.randn(8, 8))
        _ = layer.weight
    for _ in range(20):
        _ = layer.weight
    assert norm(layer) == pytest.approx(1, abs=0.03)


def test_vectors_that_were_loaded_are_iterated(side):
    _, functions = side
    layer = functions.spectral_norm(linear(6, 6))
    _ = layer.weight
    drawn = {k: normalize(torch.randn(6), dim=0) for k in layer.state_dict() if k[-2:] in "_u_v"}
    layer.load_state_dict(drawn, strict=False)
    for _ in range(60):
        _ = layer.weight
    assert norm(layer) == pytest.approx(1, abs=0.01)


def test_backward_through_evaluation_and_training_mode_at_once(side):
    _, functions = side
    layer, x = functions.spectral_norm(linear()), torch.randn(2, 4)
    (layer.eval()(x).sum() + layer.train()(x).sum()).backward()
    real, fake = layer(x).mean(), layer(-x).mean()
    real.backward()
    layer(2 * x).mean()
    fake.backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("transform", [False, True], ids=["function", "transform"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_computes_again_takes_no_step(transform, reentrant):
    """In torch it does, and the gradient is that of another value."""
    layer = linear().double()
    if transform:
        api.register_parametrization(layer, "weight", SpectralNorm())
    else:
        functions.spectral_norm(layer)
    plain = copy.deepcopy(layer)
    x = torch.randn(2, 4, dtype=torch.double, requires_grad=True)
    plain(x).square().sum().backward()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    gradients = [m.parametrizations.weight.original.grad for m in (plain, layer)]
    assert torch.equal(*gradients)
    for a, b in zip(plain.buffers(), layer.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["spectral_norm", "orthogonal", "weight_norm"])
def test_tensors_can_be_swapped_after_a_forward(side, name):
    _, functions = side
    layer = getattr(functions, name)(linear())
    layer(torch.randn(2, 4)).sum().backward()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
        layer.double()
        assert layer.weight.dtype is torch.double
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    layer._apply(lambda t: TwoTensor(t, t))
    assert isinstance(layer.parametrizations.weight, nn.Module)


def test_a_patch_of_the_class_is_undone(side):
    _, functions = side
    layer, other = (functions.weight_norm(linear(seed=i)) for i in range(2))
    for name in ("forward", "reset_parameters", "nothing"):
        with mock.patch.object(type(layer), name, create=True, return_value="patched"):
            assert getattr(layer, name)(torch.ones(1, 4)) == "patched"
    assert layer(torch.ones(1, 4)).shape == other(torch.ones(1, 4)).shape == (1, 4)
    assert not hasattr(layer, "nothing")


def test_the_property_of_a_shared_class_cannot_be_deleted():
    layer = api.register_parametrization(linear(), "weight", Double())
    with pytest.raises(RuntimeError, match="'weight' belongs to a module"):
        del type(layer).weight
    assert layer.weight.shape == (4, 4)


def test_functional_call_from_threads_uses_each_threads_value_and_leaves_nothing():
    layer = functions.weight_norm(linear(bias=False))
    start, wrong = threading.Barrier(4), []

    def work(i):
        W, x = torch.full((4, 4), float(i)), torch.ones(1, 4)
        start.wait()
        for _ in range(200):
            out = functional_call(layer, {"weight": W}, (x,))
            if not torch.equal(out, x @ W.T):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not any(key.startswith("_funcparam") for key in vars(layer))
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(3)
    assert_close(layer.weight.norm(dim=1), torch.full((4,), 3.0))


def test_a_thread_that_works_for_a_functional_call_sees_its_value():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = functions.weight_norm(linear(bias=False))

        def forward(self, x):
            outs = []
            thread = threading.Thread(target=lambda: outs.append(self.layer(x)))
            thread.start()
            thread.join()
            return outs[0]

    net, W = Parallel(), torch.eye(4)
    assert_close(functional_call(net, {"layer.weight": W}, (W,)), W)


def test_the_value_that_was_taken_out_can_be_put_in_again():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = functions.weight_norm(linear(bias=False))

        def forward(self, x):
            return functional_call(self.layer, {"weight": self.before}, (x,))

    net, x = Inner(), torch.eye(4)
    net.before = net.layer.weight.detach()
    with api.cached():
        net.before = net.layer.weight
        out = functional_call(net, {"layer.weight": torch.zeros(4, 4)}, (x,))
    assert_close(out, x @ net.before.T)
    assert not any(key.startswith("_funcparam") for key in vars(net.layer))


def test_a_compiled_module_inside_of_functional_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = functions.weight_norm(linear(bias=False))
            self.compiled = torch.compile(lambda x: self.layer(x), backend="eager", fullgraph=True)

        def forward(self, x):
            return self.compiled(x)

    net, x = Net(), torch.eye(4)
    for W in (torch.ones(4, 4), torch.eye(4)):
        assert_close(functional_call(net, {"layer.weight": W}, (x,)), x @ W.T)
    assert_close(net(x), x @ net.layer.weight.T)


def test_a_copy_inside_of_a_compiled_function(side):
    _, functions = side
    layer, x = functions.weight_norm(linear()), torch.ones(1, 4)
    compiled = torch.compile(lambda x: copy.deepcopy(layer)(x), backend="eager")
    assert_close(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_scripting_gives_torchs_error_when_it_runs(side):
    _, functions = side
    scripted = torch.jit.script(nn.Sequential(functions.weight_norm(linear())))
    with pytest.raises(torch.jit.Error, match="not working with scripting"):
        scripted(torch.ones(1, 4))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("part", ["spectral_norm", "orthogonal", Double(), Symmetric(), torch.tanh])
def test_scripting_of_what_torch_does_not_compile(part):
    if isinstance(part, str):
        layer = getattr(functions, part)(linear())
    else:
        layer = api.register_parametrization(linear(), "weight", part, unsafe=True)
    scripted = torch.jit.script(nn.Sequential(layer))
    with pytest.raises(torch.jit.Error, match="not working with scripting"):
        scripted(torch.ones(1, 4))


def test_a_hook_on_a_parametrization_runs_at_each_read(side):
    _, functions = side
    layer, calls = functions.spectral_norm(linear()), []
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        _ = layer.weight
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", BOTH)
def test_a_weight_that_was_zero_is_followed_again_by_compat_alone(name, dtype):
    layer = BOTH[name][1].spectral_norm(linear(6, 6).to(dtype))
    raw = layer.parametrizations.weight.original
    kept = raw.detach().clone()
    vectors = [buffer.clone() for buffer in layer.parametrizations.weight[0].buffers()]
    raw.data.zero_()
    assert bool((layer.weight == 0).all()) == (name == "compat")
    if name == "compat":
        assert all(map(torch.equal, layer.parametrizations.weight[0].buffers(), vectors))
        raw.data.copy_(kept)
        for _ in range(60):
            _ = layer.weight
        assert norm(layer.float()) == pytest.approx(1, abs=0.01)


def test_a_large_weight_is_divided_by_its_norm():
    layer = functions.spectral_norm(linear(6, 6))
    layer.parametrizations.weight.original.data.mul_(1e25)  # where squares overflow
    assert norm(layer) == pytest.approx(1, abs=0.1)
