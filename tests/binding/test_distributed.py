"""The module shell on two processes: losses, gradients and values are those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

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
SHELLS = ["shells", "shells, checkpoints inside", "shells, checkpoints around"]


def worker(rank):
    found = {kind: trained_in_blocks(rank, kind) for kind in SHELLS}
    evaluation.SMALLEST = 0  # in this process: every value counts as large
    return {**found, **{kind: trained(rank, kind) for kind in KINDS}}


def trained(rank, kind):
    model, x = model_and_data(recompute="recompute" in kind)
    wrapped = DistributedDataParallel(model) if "ddp" in kind else fully_shard(model)
    losses = train(wrapped, [x[4 * rank :][:4]] * 3)
    dist.all_reduce(losses)
    state = {name: full(t).detach() for name, t in model.state_dict().items()}
    return losses / 2, state, model.fold()[0].weight.detach()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)
        self.checkpointed = False

    def body(self, x):
        return self.two(self.one(x).tanh())

    def forward(self, x):
        if self.checkpointed:
            return x + checkpoint(self.body, x, use_reentrant=False)
        return x + self.body(x)


IN_BLOCKS = {"*.one.weight": Orthogonal(), "*.two.weight": SpectralNorm(), "2.weight": WeightNorm()}


def blocks():
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block(), nn.Linear(6, 6)).double()
    return net, torch.randn(8, 6).double()


def trained_in_blocks(rank, kind):
    """What it learns, and what methods do, with a sharded shell around each block."""
    net, x = blocks()
    model = fp.shells(net, IN_BLOCKS, block=Block)
    if "around" in kind:
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, fp.Parametrized))
    own = [m for m in model.modules() if isinstance(m, fp.Parametrized)]
    for block in (net for shell in own for net in shell.modules() if isinstance(net, Block)):
        block.checkpointed = "inside" in kind
    for shell in own:
        fully_shard(shell)
    fully_shard(model)
    losses = train(model, [x[4 * rank :][:4]] * 3)
    dist.all_reduce(losses)
    before = [shell.values() for shell in own]
    for shell in own:
        shell.rebase()
    after = [shell.values() for shell in own]
    told = [(shell.violation(), str(shell.summary())) for shell in own]
    written = [
        fp.checkpoint.write(s.parametrization, *s.raw_and_state(), s.net, style="plain")
        for s in own
    ]
    plain = own[0].fold().state_dict()
    half = {name: 0.5 * t if name.endswith("bias") else t for name, t in plain.items()}
    own[0].load_state_dict(half)
    found = {n: t.detach() for n, t in own[0].values().items()}
    drawn = torch.linspace(-1, 1, 48, dtype=x.dtype).reshape(8, 6)
    with own[1].bound() as block, torch.no_grad():  # of which every process has all
        block.one.weight.copy_(drawn)
    put = own[1].values()["one.weight"]
    return (
        losses / 2,
        detached(before),
        detached(after),
        detached(told),
        detached(written),
        half,
        found,
        detached(put),
    )


def detached(tree):
    return torch.utils._pytree.tree_map(
        lambda t: t.detach() if isinstance(t, torch.Tensor) else t, tree
    )


@pytest.mark.parametrize("kind", SHELLS)
def test_shells_of_blocks_on_two_processes_equal_one(kind, results):
    losses, before, after, told, written, half, found, put = results[kind]
    net, x = blocks()
    alone = fp.shells(net, IN_BLOCKS, block=Block)
    torch.testing.assert_close(losses, train(alone, [x] * 3))
    own = [m for m in alone.modules() if isinstance(m, fp.Parametrized)]
    torch.testing.assert_close(before, detached([shell.values() for shell in own]))
    torch.testing.assert_close(after, before)
    for shell in own:
        shell.rebase()
    for (violation, table), shell in zip(told, own, strict=True):
        torch.testing.assert_close(violation, detached(shell.violation()))
        assert table.splitlines()[0] == str(shell.summary()).splitlines()[0]
    torch.testing.assert_close(
        [dict(w) for w in written], [dict(shell.fold().state_dict()) for shell in own]
    )
    torch.testing.assert_close(found, dict(half), rtol=1e-4, atol=1e-4)  # spectral norms lag
    drawn = torch.linspace(-1, 1, 48, dtype=x.dtype).reshape(8, 6)
    torch.testing.assert_close(put, Orthogonal().forward(*Orthogonal().right_inverse(drawn)))


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


@pytest.mark.parametrize("widths", [(4, 5, 6, 7), (4, 4, 4, 4, 4)], ids=["alone", "stacked"])
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # its own collectives
@pytest.mark.usefixtures("one_process")
def test_a_compiled_step_in_several_buckets(widths):
    net = nn.Sequential(*map(nn.Linear, widths[:-1], widths[1:]))
    alone = widths[0] != widths[1]
    rules = {"*.weight": Chain(SpectralNorm(), Affine(scale=2.0)) if alone else SpectralNorm()}
    model = fp.Parametrized(net, fp.parametrize(net, rules), recompute=alone)
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
