"""Parametrized modules on two processes: losses and raw are those of one process.

Known problem 19: after `fully_shard` torch's own weights cannot be read in most of the maps.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from funcparam.compat.parametrizations import orthogonal, spectral_norm, weight_norm
from tests.processes import on_two


def model_and_data():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6).double() for _ in range(5)]
    for layer, map_ in zip(layers, ["matrix_exp", "cayley", "householder"], strict=False):
        orthogonal(layer, orthogonal_map=map_)
    weight_norm(layers[3])
    spectral_norm(layers[4])
    return nn.Sequential(*layers), torch.randn(8, 6).double()


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


KINDS = ["ddp", "fully_shard"]


def worker(rank):
    return {kind: trained(rank, kind) for kind in KINDS}


def trained(rank, kind):
    model, x = model_and_data()
    wrapped = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
    losses = train(wrapped, [x[4 * rank :][:4]] * 3)
    dist.all_reduce(losses)
    raw = {name: full(tensor).detach() for name, tensor in model.state_dict().items()}
    return losses / 2, raw, [layer.weight.detach() for layer in model.eval()]


@pytest.fixture(scope="module")
def results():
    return on_two(worker)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, results):
    losses, raw, values = results[kind]
    model, x = model_and_data()
    alone = copy.deepcopy(model)
    torch.testing.assert_close(losses, train(alone, [x] * 3))
    torch.testing.assert_close(raw, dict(alone.state_dict()))
    torch.testing.assert_close(values, [layer.weight.detach() for layer in alone.eval()])
