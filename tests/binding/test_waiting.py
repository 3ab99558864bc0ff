"""Whole training steps wait for no device: see tests/laws/test_sync.py for each transform."""

import pytest
import torch
from torch.optim import SGD

import funcparam as fp
from funcparam.transforms import Orthogonal, UnitNorm, WeightNorm
from tests.networks import Classifier, mixed, mlp
from tests.waiting import Waits

pytestmark = pytest.mark.usefixtures("entries_are_far")
X = torch.ones(4, 6, dtype=torch.float64)


def nothing_waits(step):
    """The second time: the first may look at what is there."""
    step()
    with Waits() as waits:
        step()
    assert waits.found == set()


def training(net, optimizer):
    def step():
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("recompute", [False, True])
def test_the_shell(recompute):
    net, p = mixed()
    model = fp.Parametrized(net, p, recompute=recompute)
    nothing_waits(training(model, SGD(model.parameters(), lr=0.1)))
    nothing_waits(model.rebase)
    nothing_waits(model.values)
    model.eval()
    nothing_waits(lambda: model(X))
    nothing_waits(torch.no_grad()(lambda: model(X)))


def test_shells_for_blocks():
    model = fp.shells(mlp(), {"*.weight": Orthogonal("cayley")}, block=torch.nn.Linear)
    nothing_waits(training(model, SGD(model.parameters(), lr=0.1)))


def test_functions():
    net, p = mixed()
    raw, state = p.init(net)
    call = fp.functional_call(net)

    def step():
        values, new = p.advance(raw, state)
        loss = call(values, (X,)).sum()
        torch.autograd.grad(loss, fp.trainable(raw))
        return p.update(raw, new)

    fp.trainable(raw)
    nothing_waits(step)
    nothing_waits(lambda: p.rebase(raw, state))


def test_projected_training():
    net = mlp()
    p = fp.parametrize(net, {"0.weight": Orthogonal(), "2.weight": UnitNorm()})
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    fp.project_after(optimizer, p, net)
    fp.tangent_before(optimizer, p, net)
    fp.relative_steps(optimizer, p, net)
    nothing_waits(training(net, optimizer))


def test_a_fused_network_with_running_statistics():
    net = Classifier(inputs=6).double()
    model = fp.Parametrized(net, fp.parametrize(net, {"rnn.weight_hh_*": WeightNorm()}))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    nothing_waits(lambda: model(x).sum().backward())
