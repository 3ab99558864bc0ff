"""The module shell on two processes: losses, gradients and values are those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import funcparam as fp
from funcparam.binding import call
from funcparam.transforms import LoRA, Orthogonal, SpectralNorm, WeightNorm
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
    call.SMALLEST = 0  # in this process: every value counts as large
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
