"""Activation checkpoints inside of a network and around it: gradients are those without any."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils import checkpoint as module
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import funcparam as fp
from funcparam.transforms import Orthogonal, Positive, SpectralNorm, WeightNorm
from tests.versions import words_of_213

RULES = {
    "blocks.0.one.weight": Orthogonal(),
    "blocks.1.one.weight": SpectralNorm(),
    "blocks.2.one.weight": WeightNorm(),
    "blocks.*.scale": Positive(),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.two(self.one(x).sin()) * self.scale)


class Net(nn.Module):
    """Blocks with a tie across them, a block that is used twice, and checkpoints."""

    def __init__(self, how=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].two.weight = self.blocks[0].one.weight
        self.head = nn.Linear(4, 4)
        self.how = how

    def block(self, i, x):
        if self.how is None:
            return self.blocks[i](x)
        if self.how == "nested":
            inner = functools.partial(checkpoint, self.blocks[i], use_reentrant=False)
            return checkpoint(inner, x, use_reentrant=False)
        return checkpoint(self.blocks[i], x, use_reentrant=self.how == "reentrant")

    def forward(self, x):
        for i in (0, 1, 1, 2):
            x = self.block(i, x)
        return self.head(x)


HOW = ["reentrant", "not reentrant", "nested"]


@pytest.fixture(params=[None, 0], ids=["at once", "late"])
def sizes(request, monkeypatch):
    """Whether small values count as large."""
    if request.param is not None:
        monkeypatch.setattr("funcparam.binding.evaluation.SMALLEST", request.param)


def net_with(how):
    torch.manual_seed(0)
    return Net(how)


def shell(how, **options):
    net = net_with(how)
    model = fp.Parametrized(net, fp.parametrize(net, RULES), **options)
    with torch.no_grad():
        for own in model.parameters():
            own.add_(0.3 * torch.rand_like(own))
    return model


def steps(call, forwards):
    """Losses of several forwards, each with noise of its own, and one backward."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, requires_grad=True)
    loss = sum(call((k + 1) * x).square().sum() for k in range(forwards))
    loss.backward()
    return x.grad


def gradients(model):
    return {name: own.grad for name, own in model.named_parameters()}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_in_the_network_of_a_shell(how, forwards, recompute, training, sizes):
    plain, model = shell(None).train(training), shell(how, recompute=recompute).train(training)
    torch.testing.assert_close(steps(model, forwards), steps(plain, forwards), rtol=0, atol=0)
    exact = not recompute and how != "reentrant"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(gradients(model), gradients(plain), **tolerance)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert all(at.read() is None for own in model._looked_up().at.values() for at in own)
    assert torch_is_untouched()


def torch_is_untouched():
    inherited = module.CheckpointFunction.__dict__.get("apply") is None
    return inherited and module._CheckpointFrame.__name__ == "_CheckpointFrame"


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("form", ["functional", "bound", "recompute"])
def test_in_functional_form(how, forwards, form):
    found = []
    for own in (None, how):
        net = net_with(own)
        p = fp.parametrize(net, RULES)
        torch.manual_seed(3)
        raw, state = p.init(net)
        raw = tree_map(lambda t: (t + 0.3 * torch.rand_like(t)).requires_grad_(), raw)

        def call(x, net=net, p=p, raw=raw, state=state):
            if form == "recompute":
                return fp.recompute(net, p)(raw, state, (x,))
            if form == "functional":
                return fp.functional_call(net)(p(raw, state), (x,))
            with fp.bound(net, p(raw, state)):
                return net(x)

        found.append([steps(call, forwards), *(t.grad for t in tree_leaves(raw))])
        assert all(own.grad is None for own in net.parameters())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    if how != "reentrant" and form != "recompute":
        torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_value_that_is_used_in_two_checkpoints_and_outside():
    class Shared(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.layer, self.reentrant = nn.Linear(4, 4), reentrant

        def forward(self, x):
            if self.reentrant is None:
                return self.layer(self.layer(self.layer(x).sin()).sin())
            for _ in range(2):
                body = lambda x: self.layer(x).sin()  # noqa: E731
                x = checkpoint(body, x, use_reentrant=self.reentrant)
            return self.layer(x)

    found = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        net = Shared(reentrant)
        model = fp.Parametrized(net, fp.parametrize(net, {"layer.weight": Orthogonal()}))
        steps(model, 2)
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0])


def test_a_reentrant_checkpoint_whose_input_needs_no_gradient():
    torch.manual_seed(0)
    model, plain = shell("reentrant").eval(), shell(None).eval()
    x = torch.randn(2, 4)
    for net in (model, plain):
        net(x).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(plain))


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT:FutureWarning")
@pytest.mark.parametrize("kind", ["NO_REENTRANT", "REENTRANT", "composable", "apply"])
def test_the_wrappers_of_torch_distributed(kind):
    plain, model = shell(None), shell(None)
    if kind == "apply":
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
        assert type(model.net.blocks[0]).__name__ == "CheckpointWrapper"
    else:
        for i, block in enumerate(model.net.blocks):
            if kind == "composable":
                composable(block)
            else:
                impl = CheckpointImpl[kind]
                model.net.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=impl)
    torch.testing.assert_close(steps(model, 2), steps(plain, 2), rtol=0, atol=0)
    ours, theirs = gradients(model), gradients(plain)
    ours = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in ours.items()}
    torch.testing.assert_close(ours, theirs)


def test_a_nested_call_of_the_same_network():
    class Outer(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.a, self.b, self.how, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), how, None

        def body(self, x):
            return self.b(self.a(x).sin())

        def forward(self, x):
            inner, self.inner = self.inner, None
            out = checkpoint(self.body, x, use_reentrant=False) if self.how else self.body(x)
            return out if inner is None else out + inner(x)

    found = []
    for how in (False, True):
        torch.manual_seed(0)
        net = Outer(how)
        call = fp.functional_call(net)
        every = {n: t.detach().clone().requires_grad_() for n, t in net.named_parameters()}
        own = torch.randn(4, 4, requires_grad=True)
        net.inner = lambda x, call=call, own=own: call({"b.weight": own}, (x,))
        call(every, (torch.ones(1, 4),)).square().sum().backward()
        found.append([own.grad, *(t.grad for t in every.values())])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_in_threads(how):
    """Some compute again while others are in the network."""
    model = shell(how).eval()
    expected = shell(None).eval()
    threads, times = 4, 6

    def work():
        for _ in range(times):
            model(torch.ones(2, 4, requires_grad=True)).square().sum().backward()

    found = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for thread in found:
        thread.start()
    for thread in found:
        thread.join(60)
        assert not thread.is_alive()
    for _ in range(threads * times):
        expected(torch.ones(2, 4)).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(expected))
    assert torch_is_untouched()


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_backward_on_another_thread_while_the_network_runs(how):
    """As on a GPU, whose backward has a thread of its own: it does not wait for the forward."""

    class Forces(Net):
        def forward(self, x):
            energy = super().forward(x).square().sum()
            inner = threading.Thread(target=energy.backward, daemon=True)
            inner.start()
            inner.join(30)
            assert not inner.is_alive()
            return energy

    found = []
    for own in (None, how):
        torch.manual_seed(0)
        net = Forces(own)
        model = fp.Parametrized(net, fp.parametrize(net, RULES)).eval()
        model(torch.ones(2, 4, requires_grad=True))
        found.append(gradients(model))
    torch.testing.assert_close(*found)


def test_an_error_in_the_second_computation_leaves_everything_as_it_was():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.times = nn.Linear(3, 3), 0

        def body(self, x):
            self.times += 1
            if self.times > 1:
                raise ArithmeticError("again")
            return self.linear(x).sin()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    net = Failing()
    before = dict(net.linear._parameters)
    p = fp.parametrize(net, {"linear.weight": WeightNorm()})
    raw, state = p.init(net)
    fp.trainable(raw)
    out = fp.functional_call(net)(p(raw, state), (torch.ones(1, 3),))
    with pytest.raises(ArithmeticError, match="again"):
        out.sum().backward()
    assert all(net.linear._parameters[name] is own for name, own in before.items())
    assert torch_is_untouched()


def test_a_network_that_nobody_bound_is_torchs():
    net = net_with("not reentrant")
    plain = net_with(None)
    steps(net, 2)
    steps(plain, 2)
    torch.testing.assert_close(gradients(net), gradients(plain), rtol=0, atol=0)


# dynamo looks at the grad of what comes in
not_leaves = pytest.mark.filterwarnings("ignore:The .grad attribute")


def not_random(net):
    """Compiled code draws other numbers."""
    for block in net.blocks:
        block.drop.p = 0.0
    return net


@not_leaves
@pytest.mark.parametrize("how", HOW)
def test_in_a_compiled_shell(how):
    torch._dynamo.reset()
    plain, model = shell(None), shell(how)
    for own in (plain, model):
        not_random(own.net)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    steps(compiled, 2)
    steps(plain, 2)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))


@not_leaves
@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_in_a_compiled_function(how):
    torch._dynamo.reset()
    found = []
    for own in (None, how):
        net = not_random(net_with(own))
        p = fp.parametrize(net, RULES)
        raw, state = p.init(net)
        fp.trainable(raw)
        prepared = fp.functional_call(net)

        def call(x, p=p, raw=raw, state=state, prepared=prepared):
            values, _ = p.advance(raw, state)
            return prepared(values, (x,))

        steps(torch.compile(call, backend="aot_eager", fullgraph=True) if own else call, 2)
        found.append([tensor.grad for tensor in tree_leaves(raw)])
        assert all(tensor.grad is None for tensor in net.parameters())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@not_leaves
def test_checkpoints_of_compiled_blocks_in_an_eager_shell():
    torch._dynamo.reset()
    plain, model = shell(None).eval(), shell("not reentrant").eval()
    for block in model.net.blocks:
        block.compile(backend="aot_eager")
    steps(model, 2)
    steps(plain, 2)
    torch.testing.assert_close(gradients(model), gradients(plain))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing_of_a_language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, use_cache=False
    )
    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(config)
    rules = {"*.c_fc.weight": Orthogonal(), "*.c_proj.weight": SpectralNorm()}
    plain = fp.Parametrized(net, fp.parametrize(net, rules))
    tokens = torch.arange(12).reshape(2, 6)
    found = {}
    for how in (None, {}, {"use_reentrant": True}, {"use_reentrant": False}):
        model = copy.deepcopy(plain)
        if how is not None:
            model.gradient_checkpointing_enable(*([how] if how else []))
        for k in range(2):
            torch.manual_seed(k)
            model(input_ids=tokens, labels=tokens).loss.backward()
        found[str(how)] = gradients(model)
    expected = found.pop("None")
    for got in found.values():
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def around(kind, model):
    """A checkpoint and a compiler around a shell, in either order."""
    compiled = functools.partial(torch.compile, backend="aot_eager")
    reentrant = kind.split()[0] == "reentrant"
    inner = compiled(model) if "(compile)" in kind else model

    def call(x):
        return checkpoint(inner, x, use_reentrant=reentrant)

    return compiled(call) if kind.startswith("compile") else call


@not_leaves
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize(
    "kind",
    [
        "reentrant",
        "checkpoint",
        "reentrant (compile)",
        "checkpoint (compile)",
        "compile (checkpoint)",
    ],
)
def test_around_a_shell_whose_state_evolves(kind, forwards):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    p = fp.parametrize(net, {"0.weight": SpectralNorm(), "2.weight": SpectralNorm()})
    plain, model = fp.Parametrized(net, p), fp.Parametrized(net, p)
    with torch.no_grad():
        for own, theirs in zip(plain.parameters(), model.parameters(), strict=True):
            theirs.copy_(own.add_(torch.randn_like(own)))
    steps(around(kind, model), forwards)
    steps(plain, forwards)
    torch.testing.assert_close(gradients(model), gradients(plain))
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))


def test_around_and_inside_at_once():
    plain, model = shell(None), shell("not reentrant")
    outer = functools.partial(checkpoint, model, use_reentrant=False)
    twice = functools.partial(checkpoint, outer, use_reentrant=False)
    steps(twice, 2)
    steps(plain, 2)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


@words_of_213  # an older compiler breaks the graph there
def test_in_a_whole_compiled_step_around_a_shell_without_evolving_state():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    p = fp.parametrize(net, {"0.weight": Orthogonal()})
    plain, model = fp.Parametrized(net, p), fp.Parametrized(net, p)
    compiled = torch.compile(around("checkpoint", model), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4)
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
