"""What a type checker sees, in the comments; test_typing.py runs pyright over it. Never called."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import reveal_type

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import (
    Chain,
    LoRA,
    Orthogonal,
    Positive,
    Simplex,
    SpectralNorm,
    WeightNorm,
)


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor


def revealed(net: nn.Linear, layer: Layer) -> None:
    p = fp.parametrize(net, {"weight": WeightNorm(), nn.Linear: SpectralNorm()})
    reveal_type(p)  # Parametrization[dict[str, Tensor]]
    raw, state = p.init(net)
    reveal_type(raw)  # dict[str, Tensor | Mapping[str, Tensor]]
    reveal_type(state)  # dict[str, Mapping[str, Tensor]]
    reveal_type(p(raw, state))  # dict[str, Tensor]
    reveal_type(p.update(raw, state))  # dict[str, Mapping[str, Tensor]]
    reveal_type(p.rebase(raw, state)[0])  # dict[str, Tensor | Mapping[str, Tensor]]
    reveal_type(p.rebase(raw, state)[1])  # dict[str, Mapping[str, Tensor]]
    reveal_type(p.right_inverse(net)[0])  # dict[str, Tensor | Mapping[str, Tensor]]
    reveal_type(p.violation(net, state))  # dict[str, Tensor]
    reveal_type(p.log_abs_det_jacobian(raw, state))  # Tensor
    reveal_type(p.summary(raw, state))  # Table
    reveal_type(p.plan())  # Table
    reveal_type(p.plot(raw, state))  # Figure
    reveal_type(p["weight"])  # Transform[Any]
    tree = {"w": torch.ones(2)}
    reveal_type(fp.parametrize(tree, {"w": Positive()})(raw, state))  # dict[str, Tensor]
    q = fp.parametrize(layer, [("weight", Orthogonal())])
    reveal_type(q)  # Parametrization[Layer]
    reveal_type(q(raw, state))  # Layer
    reveal_type(q(raw, state).weight)  # Tensor
    model = fp.Parametrized(net, p)
    reveal_type(model)  # Parametrized
    reveal_type(model.fold())  # Module
    reveal_type(model.values())  # dict[str, Tensor]
    reveal_type(model.parametrization)  # Parametrization[dict[str, Tensor]]
    reveal_type(fp.fold(net, p(raw, state)))  # Module
    reveal_type(fp.trainable(raw))  # list[Tensor]
    reveal_type(fp.functional_call(net))  # FunctionalCall
    chosen = Orthogonal().map
    reveal_type(chosen)  # Literal['matrix_exp', 'cayley', 'householder', 'qr', 'newton_schulz']
    reveal_type(Orthogonal().trivialize)  # bool
    reveal_type(WeightNorm().dim)  # int | None
    reveal_type(LoRA(rank=2).rank)  # int
    reveal_type(LoRA(rank=2).alpha)  # float | None
    reveal_type(Orthogonal().forward(torch.ones(2), {}))  # Tensor
    reveal_type(Orthogonal().right_inverse(torch.ones(2)))  # tuple[Tensor, Mapping[str, Tensor]]
    reveal_type(WeightNorm().right_inverse(torch.ones(2))[0])  # Mapping[str, Tensor]
    reveal_type(fp.transform(torch.exp, torch.log))  # Transform[Any]
    reveal_type(fp.transforms.SpectralNorm())  # SpectralNorm
    reveal_type(Chain(Orthogonal(), Positive()).parts)  # tuple[Transform[Any], ...]
    reveal_type(checkpoint.read({}, p))  # Contents
    reveal_type(checkpoint.read({}, p).raw)  # dict[str, Tensor | Mapping[str, Tensor]]
    reveal_type(checkpoint.write(p, raw, state))  # dict[str, Any]
    reveal_type(checkpoint.convert({}, p, style="torch"))  # dict[str, Any]
    reveal_type(checkpoint.explain({}))  # Explanation
    reveal_type(checkpoint.explain({}).stored)  # tuple[Stored, ...]
    reveal_type(fp.checkpoint.load("model.pt"))  # dict[str, Any]
    reveal_type(checkpoint.save({}, "model.pt"))  # None


def refused(net: nn.Linear, layer: Layer) -> None:
    p = fp.parametrize(net, {"weight": WeightNorm()})
    q = fp.parametrize(layer, [("weight", Orthogonal())])
    raw, state = p.init(net)
    Orthogonal("euler")  # error: reportArgumentType
    Orthogonal(map="euler")  # error: reportArgumentType
    Simplex("hard")  # error: reportArgumentType
    checkpoint.write(p, raw, state, style="plane")  # error: reportArgumentType
    Orthogonal().map = "qr"  # error: reportAttributeAccessIssue
    fp.parametrize(net, 3)  # error: reportArgumentType
    fp.parametrize(net, [("weight", Orthogonal)])  # error: reportArgumentType
    fp.parametrize(net, {"weight": Orthogonal})  # error: reportArgumentType
    p(3)  # error: reportArgumentType
    p.init()  # error: reportCallIssue
    fp.Parametrized(net, q)  # error: reportArgumentType
    fp.trainable([torch.ones(2)])  # error: reportArgumentType
    fp.transforms.Orthagonal()  # error: reportAttributeAccessIssue
    fp.parametrise()  # error: reportAttributeAccessIssue
