"""The module shell on two processes: losses, gradients and values are those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import funcparam as fp
from funcparam.binding import evaluation
from funcparam.transforms import Affine, Chain, LoRA, Orthogonal, SpectralNorm, WeightNorm
from tests.processes import on_two

RULES = {
    "0.weight": Orthogonal(),
    "2.weight": SpectralNorm(),
    "4.weight": WeightNorm(),
    "6.weight": LoRA(rank=2),
}


def model_and_data(*, recompute=False):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())]
    net = nn.Sequential(*layers).double()
    model = fp.Parametrized(net, fp.parametrize(net, RULES), recompute=recompute)
    return model, torch.randn(8, 6).double()


def train(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


KINDS = ["ddp", "fully_shard", "ddp, recompute", "fully_shard, recompute"]


def worker(rank):
    evaluation.SMALLEST = 0  # in this process: every value counts as large
    return {kind: trained(rank, kind) for kind in KINDS}


def trained(rank, kind):
    model, x = model_and_data(recompute="recompute" in kind)
    wrapped = DistributedDataParallel(model) if "ddp" in kind else fully_shard(model)
    losses = train(wrapped, [x[4 * rank :][:4]] * 3)
    dist.all_reduce(losses)
    state = {name: full(t).detach() for name, t in model.state_dict().items()}
    return losses / 2, state, model.fold()[0].weight.detach()


@pytest.fixture(scope="module")
def results():
    return on_two(worker)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, results):
    losses, state, weight = results[kind]
    model, x = model_and_data()
    alone = copy.deepcopy(model)
    torch.testing.assert_close(losses, train(alone, [x] * 3))
    torch.testing.assert_close(state, dict(alone.state_dict()))
    torch.testing.assert_close(weight, alone.fold()[0].weight.detach())


@pytest.fixture
def one_process(monkeypatch):
    """A group of this process alone, whose gradients are reduced in buckets of any size."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # its own collectives
@pytest.mark.usefixtures("one_process")
def test_a_compiled_step_in_several_buckets(recompute):
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7))
    rules = {"[01].weight": SpectralNorm(), "2.weight": Chain(SpectralNorm(), Affine(scale=2.0))}
    model = fp.Parametrized(net, fp.parametrize(net, rules), recompute=recompute)
    expected = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-4)
    x = torch.randn(2, 4)
    out = torch.compile(wrapped, backend=counter)(x)
    assert torch.is_grad_enabled()
    assert counter.frame_count > 1  # the graph was cut at the buckets
    torch.testing.assert_close(out, expected(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
