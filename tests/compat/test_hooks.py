"""The older hooks under `installed()`: torch's keys, values and errors; copies and derivatives."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.func import functional_call, hessian, jvp, vmap
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from funcparam.compat import hooks, installed, parametrizations
from funcparam.compat.parametrize import register_parametrization

TORCH = {name: getattr(nn.utils, name) for name in ("weight_norm", "spectral_norm")}
HOOKS = {"weight_norm": WeightNorm, "spectral_norm": SpectralNorm}
REMOVE = {name: getattr(nn.utils, f"remove_{name}") for name in TORCH}
LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "conv": (lambda: nn.Conv1d(4, 3, 3), (2, 4, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 3, 4, 2), (2, 4, 8)),
}
KINDS = [("weight_norm", {}), ("weight_norm", {"dim": 1}), ("weight_norm", {"dim": None})]
KINDS += [("spectral_norm", {}), ("spectral_norm", {"n_power_iterations": 3})]


def hooked(functions, kind, layer, **options):
    torch.manual_seed(0)
    module = LAYERS[layer][0]().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's weight_norm is deprecated
        return functions[kind](module, **options)


OURS = {name: getattr(hooks, name) for name in TORCH}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_as_torchs_hooks_in_training_saving_and_removal(kind, options, layer):
    sides = [hooked(functions, kind, layer, **options) for functions in (TORCH, OURS)]
    x = torch.randn(LAYERS[layer][1], dtype=torch.double)
    for module in sides:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert list(sides[0].state_dict()) == list(sides[1].state_dict())
    assert_close(sides[1].state_dict(), sides[0].state_dict())
    assert_close(sides[1].weight, sides[0].weight)
    fresh = hooked(OURS, kind, layer, **options)
    fresh.load_state_dict(sides[0].state_dict())
    for module in (*sides, fresh):
        module.eval()
    expected = sides[0](x)
    assert_close(fresh(x), expected)
    for module in (*sides, fresh):
        REMOVE[kind](module)
        assert list(module.state_dict()) in (["weight", "bias"], ["bias", "weight"])
        assert type(module) is type(LAYERS[layer][0]())
        assert not module._forward_pre_hooks
        assert_close(module(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_magnitude_leaves_the_weight_exactly_as_it_was(dtype):
    layer = nn.Linear(7, 5, dtype=dtype)
    before = layer.weight.detach().clone()
    assert torch.equal(hooks.weight_norm(layer, dim=None).weight, before)


@pytest.mark.parametrize("kind", TORCH)
def test_a_copy_goes_its_own_way(kind):
    module, x = hooked(OURS, kind, "conv"), torch.randn(2, 4, 8, dtype=torch.double)
    theirs = hooked(TORCH, kind, "conv")
    theirs(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)
    module(x)
    average = AveragedModel(module.eval())
    expected = module(x)
    assert_close(average.module.weight, module.weight.detach())
    assert_close(average(x), expected)
    REMOVE[kind](average.module)
    assert_close(average(x), expected)
    assert torch.equal(module(x), expected)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert torch.equal(module(x), expected)
    assert not torch.allclose(twin(x), expected)
    again = copy.deepcopy(twin)
    assert torch.equal(again(x), twin(x))


def test_a_copied_lstm_computes_with_its_own_weights():
    torch.manual_seed(0)
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    hooks.weight_norm(lstm, "weight_hh_l0")
    expected = lstm(x)[0]
    twin = copy.deepcopy(lstm)
    with torch.no_grad():
        twin.weight_hh_l0_g.zero_()
        assert_close(lstm(x)[0], expected)
        assert not torch.allclose(twin(x)[0], expected)


@pytest.mark.parametrize("functions", [TORCH, OURS], ids=["torch", "ours"])
@pytest.mark.parametrize("kind", TORCH)
def test_a_file_is_torchs_and_becomes_ours_where_compat_is_installed(kind, functions):
    module, x = hooked(functions, kind, "linear"), torch.ones(1, 4, dtype=torch.double)
    module(x)
    expected = module.eval()(x)
    file = pickle.dumps(module)
    assert b"funcparam" not in file
    again = pickle.loads(file)
    assert_close(again(x), expected)
    (hook,) = again._forward_pre_hooks.values()
    assert type(hook) is HOOKS[kind]
    assert again.load_state_dict(module.state_dict())
    with installed():
        again = pickle.loads(file)
    again(x)
    assert_close(copy.deepcopy(again)(x), expected)
    REMOVE[kind](again)
    assert_close(again(x), expected)
    assert type(next(iter(pickle.loads(file)._forward_pre_hooks.values()))) is HOOKS[kind]


@pytest.mark.parametrize("kind", TORCH)
def test_a_file_loads_in_a_process_without_funcparam(kind, tmp_path):
    module, x = hooked(OURS, kind, "linear"), torch.ones(1, 4, dtype=torch.double)
    module(x)
    torch.save(module.eval(), tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['funcparam'] = None\n"
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(m(torch.ones(1, 4, dtype=torch.double)).sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(module(x).sum().item())


@pytest.mark.parametrize("kind", TORCH)
def test_code_that_looks_for_torchs_hooks_finds_them(kind):
    module, theirs = (hooked(functions, kind, "conv") for functions in (OURS, TORCH))
    (hook,), (torchs) = module._forward_pre_hooks.values(), HOOKS[kind]
    assert isinstance(hook, torchs)
    assert hook.__module__ == torchs.__module__
    assert (type(hook).__name__, type(hook).__qualname__) == (torchs.__name__, torchs.__qualname__)
    errors = []
    for part in (module, theirs):
        with pytest.raises(AttributeError) as caught:
            torch.jit.script(part)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    REMOVE[kind](module)
    x = torch.ones(1, 4, 8, dtype=torch.double)
    assert_close(torch.jit.script(module)(x), module(x))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("library", [torch_parametrizations, parametrizations], ids=["t", "c"])
def test_checkpoints_of_the_newer_functions_load(kind, options, layer, library):
    newer = nn.Sequential(hooked(vars(library), kind, layer, **options))
    older = nn.Sequential(hooked(OURS, kind, layer, **options))
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.add_(torch.randn_like(parameter))
    twin = copy.deepcopy(older)
    for module in (older, twin):
        module.load_state_dict(newer.state_dict())
        x = torch.randn(LAYERS[layer][1], dtype=torch.double)
        assert_close(module.eval()(x), newer.eval()(x))
        assert "0.weight" not in module.state_dict()
    for module in (older, twin):  # a plain checkpoint once the hook is gone
        REMOVE[kind](module[0])
        plain = nn.Sequential(LAYERS[layer][0]().double())
        module.load_state_dict(plain.state_dict())
        assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("library", [torch_parametrizations, parametrizations], ids=["t", "c"])
@pytest.mark.parametrize("kind", TORCH)
def test_the_older_removal_takes_off_the_newer_function(kind, library):
    module, x = hooked(vars(library), kind, "transposed"), torch.randn(2, 4, 8).double()
    expected = module.eval()(x)
    with installed():
        assert getattr(nn.utils, f"remove_{kind}")(module) is module
    assert type(module) is nn.ConvTranspose1d
    assert_close(module(x), expected)
    plain = nn.Linear(3, 3)
    for layer in (plain, parametrizations.orthogonal(nn.Linear(3, 3))):
        with pytest.raises(ValueError, match=f"{kind} of 'weight' not found in"):
            vars(hooks)[f"remove_{kind}"](layer)
    chain = register_parametrization(library.spectral_norm(plain), "weight", nn.Identity())
    with pytest.raises(ValueError, match="spectral_norm of 'weight' not found in"):
        hooks.remove_spectral_norm(chain)


@pytest.mark.parametrize("layer", LAYERS)
def test_second_derivatives_vmap_and_jvp_of_weight_norm(layer):
    module = hooked(OURS, "weight_norm", layer)
    x = torch.randn(LAYERS[layer][1], dtype=torch.double)
    names = ["weight_g", "weight_v"]
    raw = [getattr(module, name).detach().clone().requires_grad_() for name in names]

    def loss(*raw):
        return functional_call(module, dict(zip(names, raw, strict=True)), (x,)).square().sum()

    assert gradgradcheck(loss, raw)
    tangents = [torch.ones_like(tensor) for tensor in raw]
    slope = jvp(loss, tuple(raw), tuple(tangents))[1]
    assert_close(slope, sum(g.sum() for g in torch.autograd.grad(loss(*raw), raw)))
    assert hessian(loss)(*raw).isfinite().all()
    magnitudes = torch.stack([raw[0].detach(), 2 * raw[0].detach()])
    together = vmap(loss, in_dims=(0, None))(magnitudes, raw[1])
    assert_close(together, torch.stack([loss(g, raw[1]) for g in magnitudes]))
    vmap(loss, in_dims=(0, None))(magnitudes, raw[1])  # what it computed stays in the module
    assert_close(copy.deepcopy(module)(x), module(x))


def test_an_optimizer_built_before_trains_the_direction():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    before = layer.weight
    hooks.weight_norm(layer)
    assert layer.weight_v is before
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert not any(p.requires_grad for p in hooks.weight_norm(frozen).parameters())


def test_one_compiled_graph():
    module, x = hooked(OURS, "weight_norm", "conv"), torch.randn(2, 4, 8, dtype=torch.double)
    expected = module(x)
    assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)


def test_errors_leave_the_module_as_it_was():
    layer = hooks.weight_norm(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="two weight_norm hooks on the same parameter weight"):
        hooks.weight_norm(layer)
    with pytest.raises(RuntimeError, match="two spectral_norm hooks on the same parameter"):
        hooks.spectral_norm(hooks.spectral_norm(nn.Linear(3, 2)))
    bare = nn.Linear(3, 2, bias=False)
    with pytest.raises(KeyError):
        hooks.spectral_norm(bare, "missing")
    assert not bare._load_state_dict_pre_hooks
    for name in ("bias", "missing"):
        with pytest.raises(ValueError, match=f"no parameter with name '{name}'"):
            hooks.weight_norm(bare, name)
    with pytest.raises(IndexError, match="out of range"):
        hooks.weight_norm(bare, dim=5)
    assert list(bare.state_dict()) == ["weight"]
    assert bare(torch.ones(1, 3)).shape == (1, 2)
    with pytest.raises(ValueError, match="uninitialized parameters"):
        hooks.weight_norm(nn.LazyLinear(2))


def test_installed_code_gets_them_without_a_deprecation():
    with installed():
        from torch.nn.utils import remove_weight_norm, spectral_norm, weight_norm

        assert (weight_norm, spectral_norm) == (hooks.weight_norm, hooks.spectral_norm)
        assert remove_weight_norm is hooks.remove_weight_norm
        layer = weight_norm(nn.Linear(3, 2))
        remove_weight_norm(layer)
    assert {name: getattr(nn.utils, name) for name in TORCH} == TORCH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = nn.utils.weight_norm(nn.Linear(3, 2))
    with installed():
        nn.utils.remove_weight_norm(theirs)
    assert list(theirs.state_dict()) == ["bias", "weight"]
