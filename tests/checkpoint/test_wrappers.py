"""What wrappers put before and into names is left out; anything else is an error that names it."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations as torch_parametrizations

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import SpectralNorm, WeightNorm
from tests.networks import Tied


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def trained():
    module = net()
    torch_parametrizations.weight_norm(module[0])
    return module


P = fp.parametrize(net(), {"0.weight": WeightNorm(), "1.weight": SpectralNorm()})


def under(prefix, module):
    return {f"{prefix}{key}": tensor for key, tensor in module.state_dict().items()}


def data_parallel(module):
    return nn.DataParallel(module).state_dict()


def averaged(module):
    return torch.optim.swa_utils.AveragedModel(module).state_dict()


def compiled(module):
    return torch.compile(module, backend="eager").state_dict()


def one_part_compiled(module):
    module[1] = torch.compile(module[1], backend="eager")
    return module.state_dict()


def checkpointed(module):
    module[0] = checkpoint_wrapper(module[0])
    state_dict = module.state_dict()  # its hook takes the word out again
    return {k.replace("0.", "0._checkpoint_wrapped_module.", 1): t for k, t in state_dict.items()}


def averaged_data_parallel_compiled(module):
    return averaged(nn.DataParallel(torch.compile(module, backend="eager")))


def fsdp(module):
    keys = module.state_dict().items()
    return {
        f"_fsdp_wrapped_module.{k.replace('.', '._fsdp_wrapped_module.', 1)}": t for k, t in keys
    }


def lightning(module):
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.6",
        "state_dict": under("model.", module) | {"loss.weight": torch.ones(2)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(1)}}}],
        "hyper_parameters": {"lr": 0.1},
    }


def lightning_compiled(module):
    return {"state_dict": under("model._orig_mod.", module), "epoch": 3}


def deepspeed(module):
    return {"module": under("module.", module), "global_steps": 3, "lr_scheduler": None}


def of_a_program(module):
    return {"model_state_dict": module.state_dict(), "optimizer_state_dict": {"state": {}}, "t": 1}


WRAPPERS = [
    data_parallel,
    averaged,
    compiled,
    one_part_compiled,
    checkpointed,
    averaged_data_parallel_compiled,
    fsdp,
    lightning,
    lightning_compiled,
    deepspeed,
    of_a_program,
]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("make", [net, trained])
@pytest.mark.filterwarnings("ignore:values of the file do not satisfy")
def test_wrapped_files_are_read(wrap, make):
    module = make()
    expected = checkpoint.read(module.state_dict(), P)
    found = checkpoint.read(wrap(module), P)
    torch.testing.assert_close(P(found.raw, found.state), P(expected.raw, expected.state))
    assert found.others == {}


@pytest.mark.parametrize("wrap", [data_parallel, averaged, compiled, fsdp, lightning, deepspeed])
def test_wrapped_shells_are_read(wrap):
    shell = fp.Parametrized(net(), P)
    found = checkpoint.read(wrap(shell), P)
    for name, value in shell.values().items():
        assert torch.equal(P(found.raw, found.state)[name], value)


def test_the_parametrization_may_be_that_of_a_wrapper():
    module = trained()
    compiled_net = torch.compile(net(), backend="eager")
    p = fp.parametrize(compiled_net, {"_orig_mod.0.weight": WeightNorm()})
    for state_dict in (module.state_dict(), data_parallel(module), compiled(module)):
        raw, state, _ = checkpoint.read(state_dict, p)
        assert torch.equal(p(raw, state)["_orig_mod.0.weight"], module[0].weight)


def test_buffers_come_out_of_the_wrapper_too():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    p = fp.parametrize(module, {"0.weight": WeightNorm()})
    found = checkpoint.read(averaged(module), p)
    assert list(found.others) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert found.keys["1.running_var"] == "module.1.running_var"
    assert module.load_state_dict(found.others, strict=False).unexpected_keys == []


def test_a_network_with_a_module_called_module():
    inner = nn.ModuleDict({"module": nn.Linear(2, 2), "model": nn.Linear(2, 2)})
    p = fp.parametrize(inner, {"module.weight": WeightNorm()})
    for state_dict in (inner.state_dict(), data_parallel(inner), compiled(inner)):
        raw, _, others = checkpoint.read(state_dict, p)
        assert torch.equal(raw["model.weight"], inner["model"].weight)
        assert others == {}


def test_any_other_prefix_is_named():
    with pytest.raises(ValueError, match=r"all names are there, but below 'generator\.': pass"):
        checkpoint.read(under("generator.", net()), P)
    two = under("student.", net()) | under("teacher.", net())
    with pytest.raises(ValueError, match=r"several times, below 'student\.', 'teacher\.': pass"):
        checkpoint.read(two, P)
    with pytest.raises(ValueError, match=r"missing '1.weight'; got the keys"):
        checkpoint.read(under("module.", net()[:1]), P)


def test_a_part_of_a_wrapped_file():
    found = checkpoint.read(under("module.", net()[:1]), P, strict=False)
    assert sorted(found.raw) == ["0.bias", "0.weight"]
    assert found.missing == ("1.weight", "1.bias")


def test_ties_in_a_wrapper():
    tied = Tied()
    p = fp.parametrize(tied, {"decoder.weight": WeightNorm()})
    raw, _, _ = checkpoint.read(data_parallel(tied), p)
    assert torch.equal(raw["encoder.weight"]["direction"], tied.encoder.weight)
