"""Raw and state under the keys of one library or another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from funcparam.checkpoint._contents import Contents
from funcparam.checkpoint._keys import key_of
from funcparam.checkpoint._read import read
from funcparam.checkpoint._spec import KEY, Known, description
from funcparam.parametrization.boundary import (
    Entry,
    RawTree,
    StateTree,
    check_raw_tree,
    check_state_tree,
)
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.sharding import whole
from funcparam.transforms._spellings import spellings
from funcparam.transforms.contract.base import State
from funcparam.transforms.contract.signature import describe

Style: TypeAlias = Literal["funcparam", "torch", "legacy", "plain"]


def write(
    p: Parametrization[Any],
    raw: RawTree,
    state: StateTree,
    buffers: nn.Module | Mapping[str, Any] | None = None,
    *,
    style: Style = "funcparam",
) -> dict[str, Any]:
    """Lay raw and state out under the keys that one library or another expects.

    In every style but `"plain"` the result also says which transforms wrote it, as JSON in its
    attribute `_metadata`: `torch.save` and [`save`][funcparam.checkpoint.save] keep it, a copy by
    `dict` loses it.

    Args:
        p: the parametrization.
        raw: as [`Parametrization.init`][funcparam.Parametrization.init] returns it.
        state: likewise.
        buffers: the network, or its buffers by name, as [`read`][funcparam.checkpoint.read] returns
            them. They are neither in raw nor in state: the statistics of a BatchNorm are in the
            network that was called. Of a network its parameters are never taken, which are what it
            began with; for a part, `p.select(...)`, only the buffers of the part are.
        style: whose keys to use:

            * `"funcparam"`: those of [`Parametrized`][funcparam.Parametrized];
            * `"torch"`: those of `torch.nn.utils.parametrize`;
            * `"legacy"`: those of the hooks of `torch.nn.utils.weight_norm`, `spectral_norm` and
              `prune`. No other transform has any;
            * `"plain"`: the values under the network's names: the folded network.

    Returns:
        Detached tensors by key, in memory shared with raw and state as far as they are the same.
        Sharded tensors are gathered.

    Raises:
        ValueError: a transform has no legacy spelling; raw or state are not those of `p`; or `p`
            was made for a network with buffers, and they are not given.
        TypeError: likewise.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import SpectralNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": SpectralNorm()})
        >>> list(fp.checkpoint.write(p, *p.init(net), style="legacy"))
        ['weight_orig', 'weight_u', 'weight_v', 'bias']
    """
    if not isinstance(p, Parametrization):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"p: expected a parametrization, in write(p, raw, state); got {describe(p)}"
        )
    if style not in get_args(Style):
        raise ValueError(f"style: expected one of {get_args(Style)}; got {style!r}")
    others = _others(p, buffers)
    check_raw_tree(p.entries, raw)
    check_state_tree(p.entries, state)
    return written(p, raw, state, others, style)


def convert(
    state_dict: Mapping[str, Any],
    p: Parametrization[Any] | None = None,
    *,
    style: Style,
    known: Known | None = None,
) -> dict[str, Any]:
    """Read a checkpoint in any spelling and write it in another.

    [`read`][funcparam.checkpoint.read], then [`write`][funcparam.checkpoint.write]: arguments
    and errors are theirs. The buffers that are in the checkpoint are in the result.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": WeightNorm()})
        >>> old = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2)).state_dict()
        >>> list(fp.checkpoint.convert(old, p, style="legacy"))
        ['weight_g', 'weight_v', 'bias']
    """
    if style not in get_args(Style):
        raise ValueError(f"style: expected one of {get_args(Style)}; got {style!r}")
    return rewritten(read(state_dict, p, known=known), style)


def rewritten(found: Contents, style: Style) -> dict[str, Any]:
    """Lay out what was read."""
    return written(found.p, found.raw, found.state, found.others, style)


def written(
    p: Parametrization[Any],
    raw: RawTree,
    state: StateTree,
    others: Mapping[str, Any],
    style: Style,
) -> dict[str, Any]:
    """Lay out what was checked."""
    found: OrderedDict[str, Any] = OrderedDict()
    if style == "plain":  # values, of which some take others
        with torch.no_grad():
            state = p._plan.given(raw, state)  # pyright: ignore[reportPrivateUsage]
    for entry in p.entries:
        found |= _parts(entry, whole(raw[entry.name]), whole(state.get(entry.name, {})), style)
    prefix = "net." if style == "funcparam" else ""
    found |= {f"{prefix}{name}": item for name, item in others.items()}
    for key, item in found.items():  # what get_extra_state returned may be anything
        found[key] = whole(item).detach() if isinstance(item, Tensor) else item
    if style != "plain":
        cast("Any", found)._metadata = {"": {KEY: description(p)}}
    return found


def _others(
    p: Parametrization[Any], buffers: nn.Module | Mapping[str, Any] | None
) -> dict[str, Any]:
    """The buffers, of which none may be left out that the network had."""
    own = {name for entry in p.entries for name in entry.names}
    given = _of_network(p, buffers, own) if isinstance(buffers, nn.Module) else buffers or {}
    if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"buffers: expected the network, or a dict of its buffers; got {describe(given)}"
        )
    left_out = [name for name in p.buffers if name not in given]
    if left_out:
        raise ValueError(
            f"buffers: missing {left_out[0]!r}, which is neither in raw nor in state: give the"
            " network that was called, write(p, raw, state, net), or dict(net.named_buffers())"
        )
    return {name: item for name, item in given.items() if name not in own}


def _of_network(p: Parametrization[Any], net: nn.Module, own: set[str]) -> dict[str, Any]:
    """What a network has besides parameters, which raw stands for; of a part what the part has."""
    parameters = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    is_part = not parameters <= own
    others = {name: x for name, x in net.state_dict().items() if name not in parameters}
    return {name: x for name, x in others.items() if name in p.buffers or not is_part}


def _parts(entry: Entry, raw: Any, state: State, style: str) -> dict[str, Tensor]:
    """The parts of an entry by key, the same under each name of a tie."""
    transform = entry.transform
    if transform is None:
        prefix = "net." if style == "funcparam" else ""
        return {f"{prefix}{name}": cast("Tensor", raw) for name in entry.names}
    if style == "plain":
        with torch.no_grad():
            return dict.fromkeys(entry.names, transform.forward(raw, state))
    names = entry.names[:1] if style == "funcparam" else entry.names
    for spelling in spellings(transform, entry.signature):
        if spelling.style.split()[0] == style:
            parts = spelling.write(raw, state)
            return {
                key_of(name, spelling.style, part): tensor
                for name in names
                for part, tensor in parts.items()
            }
    raise ValueError(
        f"{entry.name!r}: {transform!r} has no legacy spelling. Write it in style 'torch',"
        " or 'plain' for the values"
    )
