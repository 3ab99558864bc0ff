"""A shell around each block: as one shell, with the keys of the network."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import funcparam as fp
from funcparam.transforms import Orthogonal, Positive, SpectralNorm, WeightNorm


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)
        self.width = 4

    def forward(self, x):
        return self.norm(x + self.two(self.one(x).tanh()))


class Net(nn.Module):
    def __init__(self, checkpoints=False, tied=False):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(()))
        self.checkpoints = checkpoints
        if tied:
            self.blocks[1].norm.bias = self.blocks[0].norm.bias
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            assert block.width == 4
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(x) * self.scale


RULES = {
    "*.one.weight": Orthogonal(),
    "blocks.*.two.weight": SpectralNorm(),
    "head.weight": WeightNorm(),
}


def both(checkpoints=False, **kwargs):
    torch.manual_seed(0)
    net = Net(checkpoints, **kwargs)
    rules = {"*.one.weight": Orthogonal(), "*.two.weight": SpectralNorm()} if kwargs else RULES
    one = fp.Parametrized(net, fp.parametrize(net, rules))
    return net, one, fp.shells(net, rules, block=Block)


def loss(model):
    return model(torch.linspace(-1, 1, 20).reshape(5, 4)).square().sum()


def spelt(key):
    """The key of one shell, of a key of several."""
    for word in ("raw", "state", "net"):
        parts = key.split(".")
        if word in parts:
            parts.remove(word)
            return ".".join([word, *parts])
    return f"net.{key}"


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"tied": True}], ids=["", "tied"])
def test_they_are_one_shell(checkpoints, kwargs):
    net, one, several = both(checkpoints, **kwargs)
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        for model in (one, several):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    mine = {spelt(key): t for key, t in several.state_dict().items()}
    assert mine.keys() == one.state_dict().keys()
    torch.testing.assert_close(mine, dict(one.state_dict()))
    plain = fp.unshelled(several)
    assert type(plain) is Net
    assert type(plain.blocks[0]) is Block
    assert list(plain.state_dict()) == list(net.state_dict())
    torch.testing.assert_close(dict(plain.state_dict()), dict(one.fold().state_dict()))
    if kwargs:
        for tied in (several, plain):
            assert tied.blocks[0].norm.bias is tied.blocks[1].norm.bias
            assert tied.head.weight is tied.embed.weight
    torch.testing.assert_close(loss(plain), loss(several.eval()))


def test_what_it_saves_and_loads(tmp_path):
    net, one, several = both()
    loss(several).backward()
    fresh = both()[2]
    with torch.no_grad():
        for own in fresh.parameters():
            own.mul_(0.5)
    fresh.load_state_dict(several.state_dict())
    torch.testing.assert_close(dict(fresh.state_dict()), dict(several.state_dict()))
    plain = fp.unshelled(several).state_dict()
    again = both()[2]
    assert not any(again.load_state_dict(plain))
    torch.testing.assert_close(dict(fp.unshelled(again).state_dict()), dict(plain))
    with pytest.warns(UserWarning, match=r"'blocks\.\d\.one\.weight' by up to"):
        assert not any(again.load_state_dict(net.state_dict()))
    fp.checkpoint.save(several.state_dict(), tmp_path / "a.safetensors")
    p = fp.parametrize(net, RULES)
    for given in (several.state_dict(), fp.checkpoint.load(tmp_path / "a.safetensors")):
        raw, state, others = fp.checkpoint.read(given, p)
        one.load_state_dict(fp.checkpoint.write(p, raw, state, others))
        torch.testing.assert_close(loss(one.eval()), loss(several.eval()))
    folded = fp.checkpoint.convert(several.state_dict(), p, style="plain")
    torch.testing.assert_close(folded, dict(fp.unshelled(several).state_dict()))


def test_blocks_by_predicate_and_several_types():
    net = Net()
    by_name = fp.shells(net, {"*.one.weight": Orthogonal()}, block=lambda n, m: n == "blocks.1")
    kinds = {name: type(m).__name__ for name, m in by_name.named_modules()}
    assert kinds["blocks.1"] == "Parametrized[Block]"
    assert kinds["blocks.0.one"] == "Parametrized[Linear]"
    assert kinds["blocks.0"] == "Block"
    typed = fp.shells(net, {"*.weight": WeightNorm(dim=None)}, block=(Block, nn.Linear))
    assert isinstance(typed.blocks[0], fp.Parametrized)
    assert isinstance(typed.embed, fp.Parametrized)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.block = nn.Parameter(torch.ones(4)), Block()


def test_bad_input():
    net = Net()
    with pytest.raises(ValueError, match="block: no module of the network is one"):
        fp.shells(net, RULES, block=nn.Conv2d)
    with pytest.raises(TypeError, match="block: expected a type of modules"):
        fp.shells(net, RULES, block="Block")
    with pytest.raises(ValueError, match="rule 'nope' matches nothing"):
        fp.shells(net, {"nope": WeightNorm()}, block=Block)
    net.blocks[1].one.weight = net.blocks[0].one.weight
    with pytest.raises(
        ValueError, match=r"'blocks.0.one.weight' .* tied across 'blocks.0' and 'bl"
    ):
        fp.shells(net, RULES, block=Block)
    for root in (Parent(), nn.Sequential(Parent())):
        with pytest.raises(
            ValueError, match="scale' has a rule and sits in a module that contains"
        ):
            fp.shells(root, {"*scale": Positive()}, block=Block)


def test_a_block_that_is_used_twice_has_one_shell():
    block = Block()
    net = nn.Sequential(block, nn.Tanh(), block)
    model = fp.shells(net, {"*.one.weight": Orthogonal()}, block=Block)
    assert model[0] is model[2]
    x = torch.ones(2, 4)
    plain = fp.unshelled(model)
    torch.testing.assert_close(model(x), plain(x))
    assert plain[0] is plain[2]


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_one_graph_for_all_blocks():
    counter = CompileCounterWithBackend("aot_eager")
    _, one, several = both()
    for block in several.blocks:
        block.compile(backend=counter, fullgraph=True)
    loss(several).backward()
    loss(one).backward()
    assert counter.frame_count == 1
    for key, own in several.named_parameters():
        torch.testing.assert_close(own.grad, one.get_parameter(spelt(key)).grad)
