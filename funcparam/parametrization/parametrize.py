"""From rules to a parametrization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, overload

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcparam.parametrization.boundary import Entry
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.selection import Rule, Rules, picked_by, select
from funcparam.parametrization.tree import Leaf, flatten
from funcparam.transforms.contract.signature import (
    Signature,
    TensorSpec,
    expect_dense,
    expect_static,
    signature,
)

Params = TypeVar("Params")


@overload
def parametrize(
    params: nn.Module, rules: Rules, *, ties: bool = False
) -> Parametrization[dict[str, Tensor]]: ...
@overload
def parametrize(params: Params, rules: Rules, *, ties: bool = False) -> Parametrization[Params]: ...
def parametrize(params: Any, rules: Rules, *, ties: bool = False) -> Parametrization[Any]:
    """Choose a transform for each weight by rules, and compose them into one function.

    A transform maps raw, the tensors that are trained, to the value, the weight that the network
    uses: orthogonal, positive, of low rank, whatever raw is. State is what a transform keeps and
    does not train, such as a base point. The transforms are in `funcparam.transforms`
    (`Orthogonal`, `WeightNorm`, `SpectralNorm`, `Positive`, `LoRA`, `Mask`, ...; `dir` lists them),
    `help` of each has its formula, and `fp.transform(forward, right_inverse)` makes one from two
    functions. `Chain(a, b)` is two on one weight, the value being `b(a(raw))`.

    The result, `p`, is an immutable mapping from names to transforms, and a function:

    * `raw, state = p.init(net)` takes both from the weights of `net`, which stays as it is: two
      dictionaries by name, of a tensor or a dictionary of tensors each. What no rule picks is in
      raw as it is, and is trained as it is, also if it was frozen in the network: `Frozen()`, or
      a part of raw for `fp.trainable`, keeps a weight from training.
    * `p(raw, state)` gives the weights under the names of `net`, as
      `torch.func.functional_call(net, p(raw, state), (x,))` takes them. It is a pure function:
      `grad`, `vmap`, `torch.compile` and `torch.export` go through.
    * `fp.trainable(raw)` lists the tensors for an optimizer, which changes them in place. Without
      one, `torch.func.grad(loss)(raw, state)` has the names of raw.
    * `state = p.update(raw, state)`, once a training step, advances what evolves besides raw (the
      power iteration of `SpectralNorm`); elsewhere it changes nothing.
    * `print(p)`, `p.summary(raw, state)` and `p.plot(raw, state)` say what is there;
      `p.violation(p(raw, state), state)`, how far each weight is from its constraint.
    * `fp.fold(net, p(raw, state))` is a plain copy of `net` with the weights in it;
      `fp.checkpoint.write(p, raw, state, net)` is what to save, with the buffers of `net`, and
      `fp.checkpoint` reads and writes other files; `fp.Parametrized(net, p)` is all this as a
      module.

    `parametrize` itself computes and changes nothing: shapes are worked out on meta tensors. So
    one `p` serves every network of the same names and shapes, an ensemble's members for one.

    Args:
        params: a module, of which all parameters and the buffers that rules name are taken; or
            any tree of tensors (dicts, lists, tuples, named tuples, dataclasses registered with
            optree), whose names are paths joined by dots. `p` returns a tree of the same
            structure (of a flat mapping: a dict).
        rules: a mapping, or a list of pairs, from selectors to transforms. A selector is

            * a name, `"head.weight"`;
            * a glob, `"encoder.*.weight"`: `*` is any text, dots too, `?` a character, `[ab]` one
              of these;
            * a module type, `nn.Conv2d`: every parameter, biases too, that sits directly in such a
              module or in one of a subclass;
            * a pair of module type and name or glob there, `(nn.LSTM, "weight_hh_*")`;
            * a predicate, `lambda name, tensor: tensor.ndim == 2`.

            The first that matches a name wins, so narrower ones come first. A weight that has
            several names because it is tied is one weight: a rule for one of its names is a rule
            for all. Buffers are picked by their whole name only, alone or in a pair. Names are
            those of `net.named_parameters()`; no rules at all, `[]`, is allowed.
        ties: whether one tensor at several places of a tree is one weight, as it always is in a
            module. In a tree it may as well be an initial value that several weights share.

    Returns:
        The parametrization, an immutable [`Parametrization`][funcparam.Parametrization].

    Raises:
        ValueError: a rule matches nothing (the closest names are said) or never applies; two
            rules pick a tied weight, each by a name of its own; a transform cannot serve a value's
            shape or dtype.
        TypeError: a selector, a transform or a leaf is not one.

    Example:
        >>> import torch, funcparam as fp
        >>> from torch import nn
        >>> from funcparam.transforms import Affine, Chain, Orthogonal, Positive, UnitNorm
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        >>> p = fp.parametrize(
        ...     net,
        ...     {
        ...         "0.weight": Orthogonal(),
        ...         (nn.BatchNorm1d, "weight"): Positive(),
        ...         "*.weight": Chain(UnitNorm(), Affine(scale=2.0)),  # rows of length 2
        ...     },
        ... )
        >>> list(p)
        ['0.weight', '1.weight', '2.weight']
        >>> raw, state = p.init(net)
        >>> optimizer = torch.optim.Adam(fp.trainable(raw), lr=0.1)
        >>> x, y = torch.randn(8, 4), torch.randn(8, 4)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     out = torch.func.functional_call(net, p(raw, state), (x,))
        ...     nn.functional.mse_loss(out, y).backward()
        ...     optimizer.step()
        ...     state = p.update(raw, state)
        >>> values = p(raw, state)
        >>> W = values["0.weight"]
        >>> torch.allclose(W.T @ W, torch.eye(4), atol=1e-5)
        True
        >>> torch.allclose(values["2.weight"].norm(dim=1), torch.tensor(2.0))
        True
        >>> trained = fp.fold(net, p(raw, state))
    """
    leaves, structure = flatten(params, ties=ties)
    chosen = select(rules, leaves)
    kept = [leaf for leaf in leaves if not leaf.is_buffer or leaf.names[0] in chosen]
    left = [leaf for leaf in leaves if leaf.is_buffer and leaf.names[0] not in chosen]
    buffers = tuple(leaf.names[0] for leaf in left if any(map(_is_saved, leaf.owners)))
    work_out = cache(signature)  # of equal layers once
    entries = tuple(_entry(leaf, chosen, work_out) for leaf in kept)
    return Parametrization(entries, structure, buffers)


def _entry(leaf: Leaf, chosen: Mapping[str, Rule], work_out: Callable[..., Signature]) -> Entry:
    name = leaf.names[0]
    if is_lazy(leaf.tensor):
        raise ValueError(
            f"{name!r} is not initialised: its module is lazy. Run one batch through the network"
            " first, which gives the weight its shape"
        )
    selector, transform = chosen.get(name, (name, None))
    try:
        if transform is not None:
            expect_static(transform)
            expect_dense(transform, leaf.tensor)
        return Entry(leaf.names, work_out(transform, TensorSpec.of(leaf.tensor)), transform)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name!r}: {error}{picked_by(selector, name)}") from error


def _is_saved(owner: tuple[nn.Module, str]) -> bool:
    module, name = owner
    return name not in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
