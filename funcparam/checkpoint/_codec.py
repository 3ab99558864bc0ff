"""Raw and state from a checkpoint in any spelling, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from copy import deepcopy
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor

from funcparam.checkpoint._keys import Stored, flat, half_legacy, key_of, scan, what_is_there
from funcparam.checkpoint._own import is_own, read_own, write_own
from funcparam.parametrization.boundary import (
    Entry,
    RawTree,
    StateTree,
    are_equal,
    check_raw_tree,
    check_state_tree,
    expect_finite,
)
from funcparam.parametrization.parametrization import Parametrization
from funcparam.transforms._spellings import Spelling, infer, spellings
from funcparam.transforms.contract.base import Raw, State
from funcparam.transforms.contract.signature import TensorSpec, describe

Style: TypeAlias = Literal["funcparam", "torch", "legacy", "plain"]


class Contents(NamedTuple):
    """What a checkpoint holds for a parametrization."""

    raw: dict[str, Raw]
    state: dict[str, State]
    others: dict[str, Any]
    """What is none of the parametrization's: the network's buffers, under the network's names."""


def read(
    state_dict: Mapping[str, Any],
    p: Parametrization[Any],
    *,
    generator: torch.Generator | None = None,
) -> Contents:
    """Take raw and state from a checkpoint, however each tensor in it is stored.

    A tensor that is stored as its transform keeps it, here or in PyTorch, is taken over exactly:
    weight norm, for one, as `raw.weight.magnitude`, as `parametrizations.weight.original0` or as
    `weight_g`. A plain or folded tensor goes through the right inverse. So does one that is
    stored for another transform, by the value that it stands for, where the keys leave no doubt
    about that value.

    Args:
        state_dict: tensors by key; nested dictionaries, as `{"raw": raw, "state": state}`, too.
        p: the parametrization to read for. Of tied names any may be there.
        generator: as for [`Parametrization.init`][funcparam.Parametrization.init].

    Returns:
        `(raw, state, others)`, copied. `others` is what `p` does not hold: the network's buffers,
        which `net.load_state_dict(others, strict=False)` takes.

    Raises:
        TypeError: something in `state_dict` is not a tensor.
        ValueError: a tensor is missing, incomplete, there twice, or of another shape; or it is
            stored for another transform than that of `p` and the keys do not say its value.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> old = {"weight_g": torch.tensor([[2.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> p = fp.parametrize({"weight": torch.zeros(1, 2)}, {"weight": WeightNorm()})
        >>> raw, state, _ = fp.checkpoint.read(old, p)
        >>> p(raw)["weight"]
        tensor([[1.2000, 1.6000]])
    """
    _expect_parametrization(p, "read(state_dict, p)")
    tensors = flat(state_dict)
    if is_own(tensors, p.entries):
        raw, state, others = read_own(tensors, p.entries)
    else:
        raw, state, others = _read_stored(tensors, p.entries, generator)
    _check(p, raw, state)
    return Contents(_copied(raw), _copied(state), _copied(others))


def write(
    p: Parametrization[Any],
    raw: RawTree,
    state: StateTree,
    others: Mapping[str, Any] | None = None,
    *,
    style: Style = "funcparam",
) -> dict[str, Any]:
    """Lay raw and state out under the keys that one library or another expects.

    Args:
        p: the parametrization.
        raw: as [`Parametrization.init`][funcparam.Parametrization.init] returns it.
        state: likewise.
        others: the network's buffers, as [`read`][funcparam.checkpoint.read] returns them.
        style: whose keys to use:

            * `"funcparam"`: those of [`Parametrized`][funcparam.Parametrized], `raw.*`, `state.*`
              and `net_buffers.*`;
            * `"torch"`: those of `torch.nn.utils.parametrize`;
            * `"legacy"`: those of the hooks of `torch.nn.utils.weight_norm`, `spectral_norm` and
              `prune`. No other transform has any;
            * `"plain"`: the values under the network's names: the folded network.

    Returns:
        Detached tensors by key, in memory shared with raw and state as far as they are the same.

    Raises:
        ValueError: a transform has no legacy spelling; or raw or state are not those of `p`.
        TypeError: likewise.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import SpectralNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": SpectralNorm()})
        >>> list(fp.checkpoint.write(p, *p.init(net), style="legacy"))
        ['weight_orig', 'weight_u', 'weight_v', 'bias']
    """
    _expect_parametrization(p, "write(p, raw, state)")
    if style not in get_args(Style):
        raise ValueError(f"style: expected one of {get_args(Style)}; got {style!r}")
    _check(p, raw, state)
    written: dict[str, Any] = {}
    for entry in p.entries:
        own, extra = raw[entry.name], state.get(entry.name, {})
        if style == "funcparam":
            written |= write_own(entry, own, extra)
        else:
            written |= _written(entry, own, extra, style)
    prefix = "net_buffers." if style == "funcparam" else ""
    written |= {f"{prefix}{name}": tensor for name, tensor in (others or {}).items()}
    return {k: t.detach() if isinstance(t, Tensor) else t for k, t in written.items()}


def convert(
    state_dict: Mapping[str, Any], p: Parametrization[Any], *, style: Style
) -> dict[str, Any]:
    """Read a checkpoint in any spelling and write it in another.

    [`read`][funcparam.checkpoint.read], then [`write`][funcparam.checkpoint.write]: arguments
    and errors are theirs.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": WeightNorm()})
        >>> old = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2)).state_dict()
        >>> list(fp.checkpoint.convert(old, p, style="legacy"))
        ['weight_g', 'weight_v', 'bias']
    """
    return write(p, *read(state_dict, p), style=style)


def _expect_parametrization(p: object, call: str) -> None:
    if not isinstance(p, Parametrization):
        raise TypeError(f"p: expected a parametrization, in {call}; got {describe(p)}")


def _check(p: Parametrization[Any], raw: RawTree, state: StateTree) -> None:
    check_raw_tree(p.entries, raw)
    check_state_tree(p.entries, state)


def _read_stored(
    tensors: Mapping[str, Any], entries: Sequence[Entry], generator: torch.Generator | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    names = {name for entry in entries for name in entry.names}
    stored: dict[str, list[Stored]] = {}
    others: dict[str, Any] = {}
    for item in scan(tensors, names):
        if item.name in names:
            stored.setdefault(item.name, []).append(item)
        else:
            others |= {key: tensors[key] for _, key in item.keys}
    for key in others:
        if name := half_legacy(key, names):
            raise ValueError(f"{key!r}: part of {name!r}, of which the other parts are missing")
    raw: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for entry in entries:
        found = [_only(stored[name]) for name in entry.names if name in stored]
        if not found:
            raise ValueError(f"missing {entry.name!r}; {what_is_there(tensors)}")
        raw[entry.name], own = _read(entry, found[0], tensors, generator)
        if own:
            state[entry.name] = own
        for other in found[1:]:
            _expect_same(found[0], other, tensors)
    return raw, state, others


def _only(found: Sequence[Stored]) -> Stored:
    if len(found) > 1:
        keys = [key for item in found for _, key in item.keys]
        raise ValueError(f"{found[0].name!r} is there twice, as {keys}: leave one of them out")
    return found[0]


def _read(
    entry: Entry, item: Stored, tensors: Mapping[str, Any], generator: torch.Generator | None
) -> tuple[Any, State]:
    parts = {part: tensors[key] for part, key in item.keys}
    if item.style == "plain":
        return _inverted(entry, parts[""], item.name, generator)
    spelling = _spelling(entry, item.style, parts.keys())
    specs = spelling.specs(entry.signature) if spelling else {}
    try:
        if spelling and all(spec.admits(parts[part]) for part, spec in specs.items()):
            return spelling.read(parts)
        inferred = infer(item.style, parts)
    except ValueError as error:
        raise ValueError(f"{item.name!r}: {error}") from error
    if inferred is None:
        for part, spec in specs.items():
            _expect_spec(spec, parts[part], item.key(part))
        raise ValueError(_no_value(entry, item))
    value = inferred.transform.forward(inferred.raw, inferred.state)
    return _inverted(entry, value, item.name, generator)


def _spelling(entry: Entry, style: str, parts: Set[str]) -> Spelling | None:
    """How the transform of an entry is spelt in these parts, if it is."""
    for spelling in spellings(entry.transform, entry.signature):
        if spelling.style == style and spelling.parts == parts:
            return spelling
    return None


def _inverted(
    entry: Entry, value: Tensor, name: str, generator: torch.Generator | None
) -> tuple[Any, State]:
    _expect_spec(entry.signature.value, value, name)
    if entry.transform is None:
        return value, {}
    expect_finite(name, value)
    try:
        return entry.transform.right_inverse(value, generator=generator)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{name!r} is stored as its value, but {error}") from error


def _expect_spec(spec: TensorSpec, tensor: Tensor, key: str) -> None:
    if not spec.admits(tensor):
        raise ValueError(f"{key!r}: expected {spec}; got {TensorSpec.of(tensor)}")


def _expect_same(first: Stored, other: Stored, tensors: Mapping[str, Any]) -> None:
    """Raise unless two names of a tie have the same tensors."""
    mine = {part: tensors[key] for part, key in first.keys}
    theirs = {part: tensors[key] for part, key in other.keys}
    if mine.keys() != theirs.keys() or not all(are_equal(mine[p], theirs[p]) for p in mine):
        raise ValueError(
            f"{first.name!r} and {other.name!r} are tied in the parametrization; got two different"
            " tensors"
        )


def _no_value(entry: Entry, item: Stored) -> str:
    keys = [key for _, key in item.keys]
    text = f"{item.name!r} is stored as {keys}, which does not say its value."
    known = [s for s in spellings(entry.transform, entry.signature) if s.style == item.style]
    if known:
        expected = [item.key(part) for part in sorted(known[0].parts)]
        return f"{text} {entry.transform!r} expects {expected}"
    return f"{text} Give it the transform that it was saved with, and fold; it has" + (
        f" {entry.transform!r}" if entry.transform else " none"
    )


def _written(entry: Entry, raw: Any, state: State, style: str) -> dict[str, Tensor]:
    """The parts of an entry by key, the same under each name of a tie."""
    transform = entry.transform
    if transform is None:
        return dict.fromkeys(entry.names, cast("Tensor", raw))
    if style == "plain":
        with torch.no_grad():
            return dict.fromkeys(entry.names, transform.forward(raw, state))
    for spelling in spellings(transform, entry.signature):
        if spelling.style.split()[0] == style:
            parts = spelling.write(raw, state)
            return {
                key_of(name, spelling.style, part): tensor
                for name in entry.names
                for part, tensor in parts.items()
            }
    raise ValueError(
        f"{entry.name!r}: {transform!r} has no legacy spelling. Write it in style 'torch',"
        " or 'plain' for the values"
    )


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    def copy(item: Any) -> Any:
        return item.detach().clone() if isinstance(item, Tensor) else deepcopy(item)

    return {
        name: {key: copy(t) for key, t in cast("Mapping[str, Any]", item).items()}
        if isinstance(item, Mapping)
        else copy(item)
        for name, item in tree.items()
    }
