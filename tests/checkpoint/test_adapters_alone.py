"""Adapters without the weights that stay, as docs/adapters.md saves them and puts them back."""

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import (
    BOFT,
    HRA,
    IA3,
    OFT,
    Chain,
    DeLoRA,
    DoRA,
    Frozen,
    Kronecker,
    LoHa,
    LoRA,
    RandLoRA,
    Sum,
    VeRA,
)

STAYS = (".base", ".0.value")  # the second one of Sum(Frozen(), part)

EACH = pytest.mark.parametrize(
    "adapter",
    [
        LoRA(2),
        LoRA(2, init="pissa"),
        LoRA(2, init="olora"),
        DoRA(2),
        DeLoRA(2),
        VeRA(2),
        RandLoRA(2),
        LoHa(2),
        OFT(2),
        BOFT(2, 1),
        HRA(2),
        IA3(),
        Sum(Frozen(), Chain(Kronecker((2, 2)))),
    ],
    ids=repr,
)


@EACH
def test_they_go_onto_the_base_network(adapter):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    p = fp.parametrize(net, {"*.weight": adapter})
    model = fp.Parametrized(net, p)
    with torch.no_grad():
        for tensor in model.raw.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    every = model.state_dict().items()
    adapters = {k: t for k, t in every if not k.startswith("net.") and not k.endswith(STAYS)}
    assert {k for k, _ in every} - adapters.keys() == {
        *("net.0.bias", "net.1.bias"),
        *(
            f"state.{i}.weight{end}"
            for i in (0, 1)
            for end in STAYS[isinstance(adapter, Sum) :][:1]
        ),
    }
    torch.manual_seed(1)  # the factors that are drawn are the file's
    other = fp.Parametrized(net, p)
    _, unexpected = other.load_state_dict(adapters, strict=False)
    assert not unexpected
    torch.testing.assert_close(other.values(), model.values())
    base = checkpoint.write(p, *p.init(net), net)
    raw, state, _ = checkpoint.read({**base, **adapters}, p)
    torch.testing.assert_close(p(raw, state), model.values())


@EACH
def test_their_part_alone_is_no_whole_weight(adapter):
    net = nn.Linear(4, 4)
    p = fp.parametrize(net, {"weight": adapter})
    only = {k: t for k, t in checkpoint.write(p, *p.init(net)).items() if not k.endswith(STAYS)}
    with pytest.raises(ValueError, match=r"missing '.*(base|value)', which"):
        checkpoint.read(only, p, strict=False)
