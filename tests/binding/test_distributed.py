"""The module shell on two processes: losses, gradients and values are those of one process."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import funcparam as fp
from funcparam.binding import call
from funcparam.transforms import LoRA, Orthogonal, SpectralNorm, WeightNorm

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


def worker(rank, port, kind, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    call.SMALLEST = 0  # in this process: every value counts as large
    model, x = model_and_data(recompute="recompute" in kind)
    wrapped = DistributedDataParallel(model) if "ddp" in kind else fully_shard(model)
    losses = train(wrapped, [x[4 * rank :][:4]] * 3)
    dist.all_reduce(losses)
    values = {name: full(t).detach() for name, t in model.state_dict().items()}
    if rank == 0:
        results["losses"], results["state"] = losses / 2, values
    folded = model.fold()  # gathers, so on every process
    if rank == 0:
        results["weight"] = folded[0].weight.detach()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fully_shard", "ddp, recompute", "fully_shard, recompute"])
def test_two_processes_equal_one(kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, kind, results), nprocs=2)
        losses, state, weight = results["losses"], results["state"], results["weight"]
    model, x = model_and_data()
    alone = copy.deepcopy(model)
    torch.testing.assert_close(losses, train(alone, [x] * 3))
    torch.testing.assert_close(state, dict(alone.state_dict()))
    torch.testing.assert_close(weight, alone.fold()[0].weight.detach())
