"""Eight threads that share: results are those of one thread, one after the other."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import funcparam as fp
from funcparam.compat import parametrizations, parametrize
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm

THREADS, STEPS, SECONDS = 8, 12, 120
RULES = {"0.weight": Orthogonal("cayley"), "2.weight": WeightNorm(), "4.weight": SpectralNorm()}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
    ).double()


def batch(k):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(k), dtype=torch.double)


def in_threads(work):
    """What `work(0)`, `work(1)`, … return, all running at once."""
    start = threading.Barrier(THREADS)
    results, errors = [None] * THREADS, []

    def run(k):
        try:
            start.wait(SECONDS)
            results[k] = work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


@pytest.fixture(params=["at once", "late"])
def recompute(request, monkeypatch):
    monkeypatch.setattr("funcparam.binding.evaluation.SMALLEST", 0)
    return request.param == "late"


def shell(recompute):
    net = network()
    return fp.Parametrized(net, fp.parametrize(net, RULES), recompute=recompute)


def test_one_shell_in_evaluation(recompute):
    model = shell(recompute).eval()

    def work(k):
        outs = []
        for step in range(STEPS):
            with torch.set_grad_enabled(bool((k + step) % 2)):
                outs.append(model(batch(100 * k + step)).detach())
        return outs

    torch.testing.assert_close(in_threads(work), list(map(work, range(THREADS))), rtol=0, atol=0)


def test_gradients_through_one_shell_in_training_add_up(recompute):
    model, alone = shell(recompute), shell(False)
    x = batch(0)

    def work(model):
        # every forward advances power iteration: what comes out depends on whose turn it is
        return [model(x).square().sum().backward() for _ in range(STEPS)]

    in_threads(lambda k: work(model))
    for _ in range(THREADS):
        work(alone)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(dict(model.state_dict()), dict(alone.state_dict()))


def test_each_thread_trains_raw_of_its_own_through_one_parametrization(recompute):
    net = network()
    net[3] = nn.Tanh()
    p = fp.parametrize(net, {n: t for n, t in RULES.items() if n != "3.weight"})
    late, plain = fp.recompute(net, p), fp.functional_call(net)

    def work(k):
        raw, state = p.init(net_of(k))
        raw = tree_map(torch.Tensor.requires_grad_, raw)
        optimizer = torch.optim.SGD(tree_leaves(raw), lr=0.1)
        for step in range(STEPS):
            state = p.update(raw, state)
            args = (batch(100 * k + step),)
            optimizer.zero_grad()
            out = late(raw, state, args) if recompute else plain(p(raw, state), args)
            out.square().mean().backward()
            optimizer.step()
        return [t.detach() for t in tree_leaves((raw, state))]

    nets = [network(k) for k in range(THREADS)]
    for other in nets:
        other[3] = nn.Tanh()

    def net_of(k):
        return nets[k]

    torch.testing.assert_close(in_threads(work), list(map(work, range(THREADS))), rtol=0, atol=0)


def stateful(seed):
    net = network(seed)
    parametrizations.orthogonal(net[0], orthogonal_map="cayley")
    parametrizations.weight_norm(net[2])
    parametrizations.spectral_norm(net[4])
    return net


def test_cached_in_threads_with_modules_of_their_own():
    def trained(net, k):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(STEPS):
            optimizer.zero_grad()
            with parametrize.cached():
                assert net[2].weight is net[2].weight
                (net(batch(k + step)) + net(batch(k))).square().mean().backward()
            optimizer.step()
        return [t.detach() for t in net.state_dict().values()]

    nets, twins = ([stateful(k) for k in range(THREADS)] for _ in range(2))
    found = in_threads(lambda k: trained(nets[k], k))
    expected = [trained(net, k) for k, net in enumerate(twins)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_cached_in_threads_with_one_module_in_evaluation():
    net = stateful(0).eval()
    start = threading.Barrier(THREADS)

    def work(k):
        with parametrize.cached():
            start.wait(SECONDS)
            values = [net[i].weight for i in (0, 2, 4)]
            outs = [net(batch(100 * k + step)).detach() for step in range(STEPS)]
            assert all(net[i].weight is value for i, value in zip((0, 2, 4), values, strict=True))
        return values, outs

    found = in_threads(work)
    for k, (values, outs) in enumerate(found):
        expected = [net(batch(100 * k + step)).detach() for step in range(STEPS)]
        torch.testing.assert_close(outs, expected, rtol=0, atol=0)
        others = [v for other, _ in found[:k] for v in other]
        assert not any(value is other for value in values for other in others)  # no cross-talk
    assert net[2].weight is not net[2].weight


class Meeting(nn.Module):
    """Multiplies by its weight while all are in it that may be at once."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.met = threading.Barrier(2)

    def forward(self, x):
        self._meet()
        out = self.weight * x
        self._meet()
        return out

    def _meet(self):
        with contextlib.suppress(threading.BrokenBarrierError):
            self.met.wait(0.2)


def at_once(*calls):
    """What each returns, all running at once."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait(SECONDS)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result(SECONDS) for done in [pool.submit(run, call) for call in calls]]


def calling(net, value):
    call, values = fp.functional_call(net), {name: value for name, _ in net.named_parameters()}
    return lambda: call(values, (torch.ones(()),))


def bound(net, value):
    values = {name: value for name, _ in net.named_parameters()}

    def call():
        with fp.bound(net, values) as own:
            return own(torch.ones(()))

    return call


@pytest.mark.parametrize("kinds", [(calling, calling), (calling, bound), (bound, bound)])
def test_two_networks_that_share_a_module_take_turns(kinds):
    part = Meeting()
    nets = nn.Sequential(part), nn.Sequential(nn.Identity(), part)
    values = torch.tensor(2.0), torch.tensor(3.0)
    calls = [kind(net, value) for kind, net, value in zip(kinds, nets, values, strict=True)]
    assert at_once(*calls) == [2.0, 3.0]


def test_a_shell_takes_turns_with_a_network_that_has_one_of_its_modules():
    net = nn.Sequential(Meeting(), nn.Linear(1, 1))
    net[0].met = None  # which cannot be copied
    model = fp.Parametrized(net, fp.parametrize(net, {"1.weight": WeightNorm()}))
    x = torch.ones(1)
    expected = model.fold()[1](x)
    model.net[0].met = threading.Barrier(2)
    other = calling(nn.Sequential(model.net[0]), torch.tensor(3.0))
    assert at_once(lambda: model(x), other) == [expected, 3.0]


def test_a_module_that_is_shared_later_is_noticed():
    part = Meeting()
    nets = nn.Sequential(part), nn.Sequential(Meeting())
    first, second = (
        calling(net, value)
        for net, value in zip(nets, (torch.tensor(2.0), torch.tensor(3.0)), strict=True)
    )
    nets[1][0] = part
    assert at_once(first, second) == [2.0, 3.0]


def test_networks_that_have_the_parts_of_several_do_not_wait_for_each_other():
    parts = [Meeting() for _ in range(2)]
    for part in parts:
        calling(nn.Sequential(part), torch.ones(()))()  # now each has a lock of its own
        part.met = threading.Barrier(1)
    one, two = (calling(nn.Sequential(*own), torch.tensor(2.0)) for own in (parts, parts[::-1]))

    def often(call):
        return {call().item() for _ in range(200)}

    assert at_once(*[partial(often, call) for call in (one, two, one, two)]) == [{4.0}] * 4
