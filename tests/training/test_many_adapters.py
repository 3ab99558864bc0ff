"""Many adapters over one base: a slot of stacked raws for each, and an id for each sample."""

import optree
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, vmap

import funcparam as fp
from funcparam.transforms import Frozen, LoRA

SLOTS, TOP, ALPHA = 4, 3, 4.0
RANKS = (1, 2, 3)
OPTIMIZERS = {
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=0.05, momentum=0.9),
    "adam": lambda tensors: torch.optim.Adam(tensors, lr=0.01),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network():
    layers = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)
    return nn.Sequential(*layers).double().requires_grad_(False)


def adapted(net, rank):
    return fp.parametrize(net, {"*.weight": LoRA(rank, ALPHA), "*": Frozen()})


def within(raw, rank):
    """The first ranks of factors alone."""
    return {
        name: {"A": own["A"][:rank].clone(), "B": own["B"][:, :rank].clone()} if own else {}
        for name, own in raw.items()
    }


def scale(rank):
    return torch.arange(TOP).lt(rank).double() * (ALPHA / max(rank, 1))


class Stack:
    """Slots for adapters of one network, which one function evaluates."""

    def __init__(self, net):
        p = adapted(net, TOP)
        pairs = [p.init(net) for _ in range(SLOTS)]
        state = pairs[0][1]
        self.raws = optree.tree_map(lambda *ts: torch.stack(ts), *[raw for raw, _ in pairs])
        self.scales = torch.stack([scale(rank) for rank in (*RANKS, 0)])

        def one(raw, scale, x):
            own = {n: {**s, "scale": scale} if "scale" in s else s for n, s in state.items()}
            return functional_call(net, p(raw, own), (x,))

        self.each = vmap(one)

    def losses(self, raws, scales, which, x, y):
        # by hand: optree's functions do not compile with every PyTorch
        picked = {n: {key: t[which] for key, t in own.items()} for n, own in raws.items()}
        return (self.each(picked, scales[which], x) - y).square().mean(-1)

    def slot(self, index):
        return optree.tree_map(lambda stack: stack[index].detach().clone(), self.raws)


def samples(step, slot, count):
    generator = torch.Generator().manual_seed(100 * step + slot)
    drawn = torch.randn(count, 9, generator=generator, dtype=torch.float64)
    return drawn[:, :5], drawn[:, 5:]


def batch(step, counts):
    """Samples of each slot, in a random order, with the slot of each and its weight in the loss."""
    found = [
        (
            torch.full((n,), slot),
            *samples(step, slot, n),
            torch.full((n,), 1 / n, dtype=torch.float64),
        )
        for slot, n in counts.items()
    ]
    order = torch.randperm(sum(counts.values()))
    return [torch.cat(parts)[order] for parts in zip(*found, strict=True)]


def alone(net, raw, rank, slot, count, steps, make):
    """The same training of one adapter, of its own rank, by itself."""
    p = adapted(net, rank)
    state = p.init(net)[1]
    raw = within(raw, rank)
    optimizer = make(fp.trainable(raw))
    for step in steps:
        x, y = samples(step, slot, count)
        optimizer.zero_grad()
        (functional_call(net, p(raw, state), (x,)) - y).square().mean(-1).mean().backward()
        optimizer.step()
    return raw


def close(stack, slot, rank, expected):
    found = within(stack.slot(slot), rank)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@every_optimizer
def test_trained_at_once_is_trained_one_by_one(make):
    """Ranks differ, and so do the numbers of samples."""
    net = network()
    stack = Stack(net)
    starts = [stack.slot(slot) for slot in range(SLOTS)]
    counts = {0: 3, 1: 5, 2: 2}
    optimizer = make(fp.trainable(stack.raws))
    for step in range(12):
        which, x, y, weight = batch(step, counts)
        optimizer.zero_grad()
        (stack.losses(stack.raws, stack.scales, which, x, y) * weight).sum().backward()
        optimizer.step()
    for slot, rank in enumerate(RANKS):
        expected = alone(net, starts[slot], rank, slot, counts[slot], range(12), make)
        assert any(t.abs().max() > 0.01 for own in expected.values() for t in own.values())
        close(stack, slot, rank, expected)
    unused = optree.tree_map(torch.equal, stack.slot(3), starts[3])
    assert all(optree.tree_leaves(unused))


def test_adapters_come_and_go_in_one_graph():
    """One leaves, and another takes its slot without a past; the others do not notice."""
    net = network()
    stack = Stack(net)
    starts = [stack.slot(slot) for slot in range(SLOTS)]
    counter = CompileCounterWithBackend("aot_eager")
    losses = torch.compile(stack.losses, backend=counter, fullgraph=True)
    make = OPTIMIZERS["sgd"]
    optimizer = make(fp.trainable(stack.raws))
    counts = {0: 3, 1: 4, 2: 2}

    def train(steps):
        for step in steps:
            which, x, y, weight = batch(step, counts)
            optimizer.zero_grad()
            (losses(stack.raws, stack.scales, which, x, y) * weight).sum().backward()
            optimizer.step()

    train(range(6))
    fresh = adapted(net, TOP).init(net)[0]
    with torch.no_grad():
        for tensor, new in zip(
            optree.tree_leaves(stack.raws), optree.tree_leaves(fresh), strict=True
        ):
            tensor[1] = new
            optimizer.state[tensor]["momentum_buffer"][1] = 0
    stack.scales[1] = scale(1)  # the newcomer has another rank
    train(range(6, 12))
    stack.scales[2] = 0  # and one is switched off
    which, x, y, _ = batch(12, counts)
    off = losses(stack.raws, stack.scales, which, x, y)[which == 2]
    torch.testing.assert_close(off, (net(x) - y).square().mean(-1)[which == 2])

    assert counter.frame_count == 1
    close(stack, 0, 1, alone(net, starts[0], 1, 0, 3, range(12), make))
    close(stack, 2, 3, alone(net, starts[2], 3, 2, 2, range(12), make))
    close(stack, 1, 1, alone(net, fresh, 1, 1, 4, range(6, 12), make))
