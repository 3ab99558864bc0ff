"""Parts of a network: selected by name, split off, and joined again."""

import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

import funcparam as fp
from funcparam.transforms import Orthogonal, Positive, RotateIn, SpectralNorm, WeightNorm
from tests.networks import Tied, mixed, mlp
from tests.parametrization.test_shared import turned

close = torch.testing.assert_close


def trained(net, p):
    """Raw and state away from init."""
    raw, state = p.init(net)
    return tree_map(lambda t: t + 0.1 * torch.randn_like(t), raw), state


def joined(parts, raw, state):
    return {k: v for part in parts for k, v in part(part.of(raw), part.of(state)).items()}


@pytest.mark.parametrize(
    "patterns", [["4.*"], ["0.weight"], ["*.bias", "2.weight"], ["*"], ["?.weight", "0.*"]]
)
def test_a_split_is_complete_and_disjoint(patterns):
    net, p = mixed()
    raw, state = trained(net, p)
    parts = p.split(*patterns)
    names = [entry.name for part in parts for entry in part.entries]
    assert sorted(names) == sorted(raw)
    assert {**parts[0].of(raw), **parts[1].of(raw)}.keys() == raw.keys()
    assert {**parts[0], **parts[1]} == dict(p)
    close(joined(parts, raw, state), p(raw, state), rtol=0, atol=0)
    assert p.select(*patterns) == parts[0]
    assert dict(parts[0].items()).items() <= p.items()


def test_all_that_a_parametrization_does():
    """A part advances, moves its base, measures, counts, hashes and pickles by itself."""
    net, p = mixed()
    raw, state = trained(net, p)
    part = p.select("4.*", "0.weight")
    own, kept = part.of(raw), part.of(state)
    values, after = part.advance(own, kept)
    whole, whole_after = p.advance(raw, state)
    close(values, part.of(whole))
    close(after, part.of(whole_after))
    close(part.update(own, kept), part.of(p.update(raw, state)))
    close(part.rebase(own, kept), tuple(map(part.of, p.rebase(raw, state))))
    close(part.violation(values, kept), part.of(p.violation(whole, state)))
    close(part.init(values), tuple(map(part.of, p.init(whole))))
    assert "4.weight" in repr(part.summary(own, kept))
    assert pickle.loads(pickle.dumps(part)) == part
    assert hash(p.select("4.*", "0.weight")) == hash(part)
    assert part.select("4.*") == p.select("4.*")


def test_a_tie_is_in_one_part():
    net = Tied()
    p = fp.parametrize(net, {"encoder.weight": Orthogonal()})
    raw, state = trained(net, p)
    head, rest = p.split("decoder.*")
    assert [e.name for e in head.entries] == ["encoder.weight", "decoder.bias"]
    assert [e.name for e in rest.entries] == ["encoder.bias"]
    values = joined((head, rest), raw, state)
    assert values["decoder.weight"] is values["encoder.weight"]
    assert values.keys() == p(raw, state).keys()
    assert head.of(values).keys() == {"encoder.weight", "decoder.weight", "decoder.bias"}


def test_members_of_an_ensemble_and_leaves_in_stacks():
    nets = [mlp(4, 6) for _ in range(3)]
    p = fp.parametrize(nets[0], {"*.weight": Orthogonal()})
    trees = [trained(net, p) for net in nets]
    raws, states = tree_map(lambda *ts: torch.stack(ts), trees[0], *trees[1:])
    parts = p.split("0.*", "2.*", "4.*", "6.*", "8.weight")
    assert "fewer than 4" not in repr(parts[0].plan())  # the leaves of a part are stacked, too
    found = vmap(lambda raw, state: joined(parts, raw, state))(raws, states)
    close(found, vmap(p)(raws, states))


def test_nested_trees():
    tree = {"a": [torch.rand(2, 2), torch.rand(2)], "b": (torch.rand(3),)}
    p = fp.parametrize(tree, {"*": Positive()})
    raw, state = p.init(tree)
    parts = p.split("a.*")
    values = joined(parts, raw, state)
    assert values.keys() == {"a.0", "a.1", "b.0"}
    close(fp.parametrize(tree, [])(values), p(raw, state))


def test_what_depends_on_another_weight_stays_with_it():
    _, p, raw, state = turned()
    parts = p.split("up.*", "down.weight", "R")
    close(joined(parts, raw, state), p(raw, state))
    message = r"'down.weight': RotateIn\(rotation='R'\) takes the value of 'R', which is not in"
    with pytest.raises(ValueError, match=message):
        p.select("down.*")
    _, plain, *_ = turned(rules={"R": Orthogonal(), "down.weight": RotateIn("R")})
    with pytest.raises(ValueError, match=message):  # behind weights without rules
        plain.select("up.*", "down.weight")
    with pytest.raises(ValueError, match=r"'up.weight': RotateOut\(.* takes the value of 'R'"):
        p.split("R", "down.*")
    assert [*p.select("R")] == ["R"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("4", r"^'4' matches nothing; '4\.\*' matches what is in it$"),
        ("4.wieght", r"^'4.wieght' matches nothing; the closest names are '4.weight'"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern, message):
    _, p = mixed()
    for pick in (p.select, p.split):
        with pytest.raises(ValueError, match=message):
            pick("0.*", pattern)
    with pytest.raises(TypeError, match="expected names or globs, one by one; got list"):
        p.select(["0.*"])


def test_rules_are_added_to_a_mapping():
    net, p = mixed()
    more = fp.parametrize(net, {**p, "2.bias": Positive(), "0.weight": SpectralNorm()})
    assert set(more) == {*p, "2.bias"}
    assert more["0.weight"] == SpectralNorm()
    assert more["4.weight"] == p["4.weight"]


def test_buffers_and_checkpoints_of_a_part():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    p = fp.parametrize(net, {"*.weight": WeightNorm(dim=None)})
    raw, state = p.init(net)
    head, body = p.split("2.*")
    file = fp.checkpoint.write(head, head.of(raw), head.of(state))
    saved = fp.checkpoint.read(file)
    assert saved.p == head
    close(saved.raw, head.of(raw))
    with pytest.raises(ValueError, match="buffers: missing '1.running_mean'"):
        fp.checkpoint.write(body, body.of(raw), body.of(state))


def test_training_a_part():
    """A frozen backbone: its values are made once, and nothing of it moves."""
    net, p = mixed()
    raw, state = trained(net, p)
    before = tree_map(torch.clone, raw)
    head, body = p.split("4.*")
    own, kept = head.of(raw), head.of(state)
    optimizer = fp.groups(own, head, net).optimizer()
    fixed = body(body.of(raw), body.of(state))
    x = torch.randn(7, 6, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        functional_call(net, {**fixed, **head(own, kept)}, (x,)).square().mean().backward()
        optimizer.step()
        own, kept = fp.move(head, head, own, kept, optimizer)
    close(body.of(raw), body.of(before), rtol=0, atol=0)
    assert all(tensor is fp.named(raw)[name] for name, tensor in fp.named(own).items())
    assert not torch.equal(raw["4.weight"], before["4.weight"])


def test_projection_of_a_part():
    net = mlp()
    p = fp.parametrize(net, {"0.weight": Orthogonal(), "2.weight": Orthogonal()})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fp.project_after(optimizer, p.select("2.*"), net)
    net(torch.randn(7, 6, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    found = p.violation(net)
    assert found["2.weight"] < 1e-12
    assert found["0.weight"] > 1e-3


def test_compiled():
    """Taken apart and joined inside of one graph."""
    net, p = mixed()
    raw, state = trained(net, p)
    head, body = p.split("4.*")

    def values(raw):
        return body(body.of(raw), body.of(state)) | head(head.of(raw), head.of(state))

    close(torch.compile(values, backend="aot_eager", fullgraph=True)(raw), p(raw, state))


def test_an_inner_loop_over_a_part_equals_the_whole():
    """ANIL: the body is evaluated once, outside of the loop, and is still trained through it."""
    evaluated = []

    def forward(raw):
        evaluated.append(raw)
        return raw.tanh()

    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    body_rule = fp.transform(forward, torch.atanh)
    p = fp.parametrize(net, {"0.weight": body_rule, "2.weight": WeightNorm()})
    raw, state = p.init(net)
    head, body = p.split("2.*")
    x, y = torch.randn(4, 9, 3).double(), torch.randn(4, 9, 2).double()

    def error(values, x, y):
        return (functional_call(net, values, (x,)) - y).square().mean()

    def descended(own, step):
        return tree_map(lambda w, g: w - 0.1 * g, own, step)

    def by_parts(raw, x, y):
        fixed, own = body(body.of(raw)), head.of(raw)
        for _ in range(3):
            own = descended(own, grad(lambda h: error({**fixed, **head(h)}, x[:5], y[:5]))(own))
        return error({**fixed, **head(own)}, x[5:], y[5:])

    def whole(raw, x, y):
        for _ in range(3):
            step = grad(lambda r: error(p(r, state), x[:5], y[:5]))(raw)
            raw = {**raw, **descended(head.of(raw), head.of(step))}
        return error(p(raw, state), x[5:], y[5:])

    def meta(loss):
        return grad(lambda raw: vmap(loss, (None, 0, 0))(raw, x, y).mean())

    evaluated.clear()
    found = meta(by_parts)(raw)
    assert len(evaluated) == 1
    close(found, meta(whole)(raw))
    assert found["0.weight"].abs().max() > 1e-3
