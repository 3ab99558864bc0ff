"""Buffers are neither in raw nor in state: a run is not saved without them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import Positive, WeightNorm


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


P = fp.parametrize(network(), {"0.weight": WeightNorm()})
STATISTICS = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def trained():
    """A functional run of a network, whose statistics are in the network."""
    net = network()
    raw, state = P.init(net)
    optimizer = torch.optim.Adam(fp.trainable(raw), 1e-2)
    x, y = 5 * torch.randn(32, 6) + 3, torch.randint(3, (32,))
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(functional_call(net, P(raw, state), (x,)), y).backward()
        optimizer.step()
    return net, raw, state, fp.fold(net, P(raw, state)).eval()(x), x


@pytest.mark.parametrize("end", ["pt", "safetensors"])
@pytest.mark.parametrize("style", ["funcparam", "torch", "legacy", "plain"])
def test_a_functional_run_is_saved_whole(tmp_path, end, style):
    net, raw, state, out, x = trained()
    path = tmp_path / f"run.{end}"
    checkpoint.save(checkpoint.write(P, raw, state, net, style=style), path)
    saved = checkpoint.read(checkpoint.load(path), P)
    assert sorted(saved.others) == sorted(STATISTICS)
    values = P(saved.raw, saved.state)
    fresh = network()
    fresh.load_state_dict(saved.others, strict=False)
    torch.testing.assert_close(fp.fold(fresh, values).eval()(x), out)
    torch.testing.assert_close(fp.fold(network(), {**values, **saved.others}).eval()(x), out)
    model = fp.Parametrized(network(), P)
    model.load_state_dict(checkpoint.load(path))
    torch.testing.assert_close(model.eval()(x), out)


def test_three_dictionaries_by_torch_alone(tmp_path):
    net, raw, state, out, x = trained()
    run = {"raw": raw, "state": state, "buffers": dict(net.named_buffers())}
    torch.save(run, tmp_path / "run.pt")
    saved = checkpoint.read(torch.load(tmp_path / "run.pt", weights_only=True), P)
    folded = fp.fold(network(), {**P(saved.raw, saved.state), **saved.others})
    torch.testing.assert_close(folded.eval()(x), out)


@pytest.mark.parametrize("style", ["funcparam", "torch", "plain"])
def test_they_are_not_left_out_in_silence(style):
    net, raw, state, _, _ = trained()
    some = {"1.running_mean": net[1].running_mean}
    for given in (None, {}, some):
        first = "1.running_var" if given else "1.running_mean"
        with pytest.raises(
            ValueError, match=f"buffers: missing '{first}', which is neither in raw"
        ):
            checkpoint.write(P, raw, state, given, style=style)
    for given in (net, net.state_dict(), dict(net.named_buffers())):
        written = checkpoint.write(P, raw, state, given, style=style)
        assert len(written) == len(checkpoint.write(P, raw, state, net, style=style))


def test_only_those_that_a_state_dict_has():
    net = nn.Linear(3, 3)
    net.register_buffer("cache", torch.ones(1), persistent=False)
    p = fp.parametrize(net, {"weight": WeightNorm()})
    assert p.buffers == ()
    assert "cache" not in checkpoint.write(p, *p.init(net), net, style="plain")


def test_buffers_with_a_rule_are_in_raw():
    net = nn.BatchNorm1d(2)
    p = fp.parametrize(net, {"running_var": Positive()})
    assert p.buffers == ("running_mean", "num_batches_tracked")
    written = checkpoint.write(p, *p.init(net), net, style="plain")
    assert sorted(written) == sorted(net.state_dict())


def test_extra_state_goes_along():
    class Scaled(nn.Linear):
        scale = 1.0

        def get_extra_state(self):
            return {"scale": self.scale}

        def set_extra_state(self, state):
            self.scale = state["scale"]

    net = Scaled(2, 2)
    net.scale = 7.0
    p = fp.parametrize(net, {"weight": WeightNorm()})
    written = checkpoint.write(p, *p.init(net), net, style="plain")
    fresh = Scaled(2, 2)
    fresh.load_state_dict(written)
    assert fresh.scale == 7.0


def test_a_parametrization_is_the_same_with_and_without():
    net = network()
    bare = fp.Parametrization(P.entries, None)
    assert bare == P
    assert hash(bare) == hash(P)
    assert copy.deepcopy(P).buffers == P.buffers == tuple(STATISTICS)
    assert checkpoint.parametrization(checkpoint.write(P, *P.init(net), net)) == P


@pytest.mark.parametrize("style", ["funcparam", "torch", "plain"])
def test_a_part_is_written_without_the_rest_of_the_network(style):
    """Whose parameters are those that it began with, not the ones that were trained."""
    net, raw, state, *_ = trained()
    head, body = P.split("3.*")
    found = checkpoint.write(head, head.of(raw), head.of(state), net, style=style)
    assert list(found) == list(checkpoint.write(head, head.of(raw), head.of(state), style=style))
    found = checkpoint.write(body, body.of(raw), body.of(state), net, style=style)
    given = dict(net.named_buffers())
    assert list(found) == list(
        checkpoint.write(body, body.of(raw), body.of(state), given, style=style)
    )
    assert not any("3." in key for key in found)


def test_what_else_a_network_keeps_is_written():
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"seen": torch.tensor(3)}

        def set_extra_state(self, state):
            pass

    net = Counting(3, 2)
    p = fp.parametrize(net, {"weight": WeightNorm()})
    net.register_buffer("later", torch.ones(1))
    found = checkpoint.write(p, *p.init(nn.Linear(3, 2)), net)
    assert {"net._extra_state", "net.later"} <= set(found)
