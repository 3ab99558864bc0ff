"""What fails leaves weights, raw, state, optimizer and network as they were, byte by byte."""

import inspect
import sys
from functools import partial

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.training import moments, moves
from funcparam.transforms import LoRA, Orthogonal, Positive, UnitNorm, WeightNorm

ADAM = partial(torch.optim.Adam, lr=0.1)


def network():
    return nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(3, 3), nn.Linear(3, 3))


RULES = {"0.weight": WeightNorm(), "1.weight": Orthogonal(), "2.weight": UnitNorm()}
MOVES = {
    "rebase": (RULES, RULES, lambda raw, p, net: ADAM(fp.trainable(raw))),
    "rebase, groups": (RULES, RULES, lambda raw, p, net: fp.groups(raw, p, net).optimizer()),
    "other rules": (
        RULES,
        {"1.weight": LoRA(1), "2.weight": WeightNorm()},
        lambda raw, p, net: ADAM(fp.named(raw).items()),
    ),
}


def trained(rules, optimizer_of):
    net = network()
    p = fp.parametrize(net, rules)
    raw, state = p.init(net)
    fp.trainable(raw)
    optimizer = optimizer_of(raw, p, net)
    for _ in range(2):
        optimizer.zero_grad()
        sum(value.sin().sum() for value in p(raw, state).values()).backward()
        optimizer.step()
    return net, p, raw, state, optimizer


def picture(tree):
    """All that a tree of tensors is: which ones, their bytes, gradients and whether they train."""
    if isinstance(tree, torch.Tensor):
        grad = None if tree.grad is None else picture(tree.grad)
        entries = tree.detach().contiguous().view(-1).view(torch.uint8).tolist()
        return id(tree), tree.requires_grad, tree.dtype, entries, grad
    if isinstance(tree, dict):
        return {key: picture(own) for key, own in tree.items()}
    if isinstance(tree, list | tuple):
        return [picture(own) for own in tree]
    return tree


def everything(net, raw, state, optimizer):
    inner = [own for own, _ in getattr(optimizer, "_inner", [])]
    optimizers = [
        (picture(each.param_groups), {id(t): picture(own) for t, own in each.state.items()})
        for each in (optimizer, *inner)
    ]
    return picture((raw, state, dict(net.state_dict(keep_vars=True)))), optimizers


class InjectedError(Exception):
    pass


def lines_until(fails, function):
    """The lines of the modules of moves that a call reaches, up to the one that is let fail."""
    files = {moves.__file__, moments.__file__}
    seen = []

    def line(frame, event, _):
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if fails(seen):
                raise InjectedError
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in files else None)
    try:
        with pytest.raises(InjectedError), torch.enable_grad():
            function()
    finally:
        sys.settrace(before)
    return seen


@pytest.mark.parametrize(("old", "new", "optimizer_of"), MOVES.values(), ids=MOVES)
def test_a_move_that_fails_at_any_line(old, new, optimizer_of):
    """Up to the first write, which is all that is left to do then."""
    net, p, raw, state, optimizer = trained(old, optimizer_of)
    q = p if new is old else fp.parametrize(net, new)
    before = everything(net, raw, state, optimizer)
    move = partial(fp.move, p, q, raw, state, optimizer)
    source, start = inspect.getsourcelines(moves.move)
    writes = start + next(i for i, line in enumerate(source) if "for write in writes" in line)
    every = lines_until(lambda seen: seen[-1] == (moves.__file__, writes), move)
    last = {line: count for count, line in enumerate(every, 1)}
    assert len(last) > 60
    for count in last.values():
        lines_until(lambda seen, count=count: len(seen) == count, move)
        assert everything(net, raw, state, optimizer) == before
    move()
    assert everything(net, raw, state, optimizer) != before


def stranger(*_):
    return ADAM([torch.zeros(1, requires_grad=True)])


def last_one_missing(raw, *_):
    return ADAM([*fp.named(raw).values()][:-2])


BAD_MOVES = {
    "values that the rule cannot be": (
        {**RULES, "2.weight": Positive()},
        None,
        "'2.weight': Positive.* expects every entry",
    ),
    "an optimizer of other tensors": (
        RULES,
        stranger,
        "'0.weight.magnitude': expected an optimizer that has this tensor of raw",
    ),
    "an optimizer without the last weight": (
        RULES,
        last_one_missing,
        "'2.weight': expected an optimizer that has this tensor of raw",
    ),
    "moments that nobody knows": (
        RULES,
        lambda raw, *_: torch.optim.Adagrad(fp.named(raw).values()),
        "expected moments .*; got 'sum' of Adagrad",
    ),
    "groups that do not say whose a tensor is": (
        {"0.weight": WeightNorm(), "1.weight": Orthogonal()} | {"2.weight": WeightNorm()},
        lambda raw, p, net: torch.optim.SGD(fp.groups(raw, p, net).param_groups(lr=0.1)),
        "'2.weight.magnitude': expected a tensor that the optimizer has, or one group",
    ),
}


@pytest.mark.parametrize(("rules", "other", "message"), BAD_MOVES.values(), ids=BAD_MOVES)
def test_a_move_that_cannot_be(rules, other, message):
    net, p, raw, state, optimizer = trained(RULES, MOVES["rebase"][2])
    optimizer = optimizer if other is None else other(raw, p, net)
    q = p if rules is RULES else fp.parametrize(net, rules)
    before = everything(net, raw, state, optimizer)
    with pytest.raises(ValueError, match=message):
        fp.move(p, q, raw, state, optimizer)
    assert everything(net, raw, state, optimizer) == before


def test_groups_that_cannot_be():
    """A partition that misses or repeats a tensor, an optimizer that cannot take a shape."""
    net = network()
    p = fp.parametrize(net, RULES)
    raw, state = p.init(net)
    less = {name: own for name, own in raw.items() if name != "1.bias"}
    twice = {**raw, "2.bias": raw["1.bias"]}
    muon = partial(torch.optim.Muon, lr=0.1)
    before = picture((raw, state))
    for own, options, message in (
        (less, {}, "raw: missing '1.bias'"),
        (twice, {}, "'1.bias' and '2.bias' are one"),
        (raw, {"kinds": {"*.bias": "matrx"}}, "'0.bias': expected one of"),
        (raw, {"batch": {"1.bias": 1}}, "'1.bias' has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            fp.groups(own, p, net, **options)
        assert picture((raw, state)) == before
    groups = fp.groups(raw, p, net)
    before = picture((raw, state))
    with pytest.raises(
        ValueError, match="'0.weight.magnitude' .kinds= of fp.groups chooses its opt"
    ):
        groups.optimizer(rest=muon)
    assert picture((raw, state)) == before


@pytest.mark.parametrize("hook", [fp.project_after, fp.tangent_before])
def test_a_projection_that_fails_in_a_step(hook, monkeypatch):
    """One weight cannot be projected: none is, and gradients are as they were."""
    net = network()
    p = fp.parametrize(net, RULES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    hook(optimizer, p, net)
    sum(tensor.sin().sum() for tensor in net.parameters()).backward()
    before = everything(net, {}, {}, optimizer)

    def fails(self, *_):
        raise ValueError("no")

    monkeypatch.setattr(UnitNorm, "project", fails)
    monkeypatch.setattr(UnitNorm, "tangent", fails)
    with pytest.raises(ValueError, match="'2.weight': no"):
        optimizer.step()
    assert everything(net, {}, {}, optimizer) == before


@pytest.mark.parametrize("hook", [fp.project_after, fp.tangent_before, fp.relative_steps])
def test_hooks_that_cannot_be_attached(hook):
    net = network()
    optimizer = torch.optim.SGD(net[:2].parameters(), lr=0.1)
    lora = fp.parametrize(net, {"0.weight": WeightNorm(), "1.weight": LoRA(1)})
    before = everything(net, {}, {}, optimizer)
    with pytest.raises(ValueError, match="'2.weight': expected an optimizer that has this weight"):
        hook(optimizer, fp.parametrize(net, RULES), net)
    if hook is not fp.relative_steps:
        with pytest.raises(NotImplementedError, match="'1.weight': LoRA.* has no projection"):
            hook(optimizer, lora, net)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert everything(net, {}, {}, optimizer) == before
