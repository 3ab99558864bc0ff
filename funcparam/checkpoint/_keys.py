"""What the keys of a state_dict say about how each tensor was stored."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from funcparam.parametrization.table import Table, Tabular
from funcparam.transforms.contract.signature import describe

_OWN = ("raw", "state", "net_buffers")

_TORCH = re.compile(r"(?P<prefix>.*?)(?<![^.])parametrizations\.(?P<local>[^.]+)\.(?P<part>.+)")

_LEGACY = (
    ("legacy weight_norm", ("_g", "_v")),
    ("legacy spectral_norm", ("_orig", "_u", "_v")),
    ("legacy prune", ("_orig", "_mask")),
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a network, how it is stored, and under which key each part of it."""

    name: str
    style: str
    keys: tuple[tuple[str, str], ...]

    def key(self, part: str) -> str:
        """The key of a part."""
        return key_of(self.name, self.style, part)


@dataclass(frozen=True, repr=False)
class Explanation(Tabular):
    """What [`explain`][funcparam.checkpoint.explain] found; prints as a table.

    Attributes:
        stored: one item for each tensor, with `name`, `style` and `keys`, pairs of part and key.
            `style` is `"plain"`, `"funcparam"`, `"torch"`, `"legacy weight_norm"`, `"legacy
            spectral_norm"` or `"legacy prune"`.
    """

    stored: tuple[Stored, ...]
    _shapes: tuple[str, ...]

    def _table(self) -> Table:
        rows = [
            (found.name, found.style, ", ".join(part for part, _ in found.keys), shapes)
            for found, shapes in zip(self.stored, self._shapes, strict=True)
        ]
        return Table(("name", "stored as", "parts", "shapes"), tuple(rows))


def explain(state_dict: Mapping[str, Any]) -> Explanation:
    """Say how each tensor of a checkpoint is stored.

    Only keys are looked at, so this needs neither the network nor a parametrization. Keys that fit
    `torch.nn.utils.parametrize` (style `"torch"`), the older hooks of `weight_norm`,
    `spectral_norm` and `prune`, or funcparam's own layout are taken for it, all others for plain
    tensors. A folded weight is a plain one.

    Args:
        state_dict: tensors by key, as `state_dict()`, `torch.load` or
            [`load`][funcparam.checkpoint.load] return them.

    Raises:
        TypeError: it is not a dictionary of tensors.
        ValueError: two tensors have one key once nested dictionaries are joined by dots.

    Example:
        >>> import torch, funcparam as fp
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
        >>> fp.checkpoint.explain(layer.state_dict())
        name    stored as  parts                 shapes
        ------  ---------  --------------------  --------------
        bias    plain                            (2,)
        weight  torch      original0, original1  (2, 1), (2, 3)
    """
    tensors = flat(state_dict)
    found = [*_scan_own(tensors)] if has_own_keys(tensors) else scan(tensors)
    shapes = (", ".join(_shape(tensors[key]) for _, key in item.keys) for item in found)
    return Explanation(tuple(found), tuple(shapes))


def flat(tensors: Any) -> dict[str, Any]:
    """The tensors of a state_dict, or of nested dictionaries, under dotted keys.

    Raises:
        TypeError: something else than a tensor is in it, apart from modules' extra state.
        ValueError: two tensors have one dotted key, or the dictionaries never end.
    """
    if not isinstance(tensors, Mapping):
        got, hint = describe(tensors), ""
        if isinstance(tensors, (str, os.PathLike)):
            hint = ". checkpoint.load(path) reads a file, save(tensors, path) writes one"
        elif hasattr(tensors, "state_dict"):
            hint = ". Pass its state_dict()"
        raise TypeError(f"expected a dict of tensors, by key; got {got}{hint}")
    found: dict[str, Any] = {}
    try:
        for key, item in _flat(cast("Mapping[Any, Any]", tensors), ""):
            if key in found:
                raise ValueError(f"{key!r} is there twice, as one key and as nested dictionaries")
            found[key] = item
    except RecursionError:
        raise ValueError(
            "expected a dict of tensors, by key; got dictionaries that are nested without end"
        ) from None
    return found


def _flat(tensors: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, item in tensors.items():
        path = f"{prefix}{key}"
        if isinstance(item, Tensor) or path.endswith("_extra_state"):
            yield path, item
        elif isinstance(item, Mapping):
            yield from _flat(cast("Mapping[Any, Any]", item), f"{path}.")
        else:
            raise TypeError(
                f"{path!r}: expected a tensor; got {describe(item)}. Of a training checkpoint, pass"
                " the entry that holds the state_dict"
            )


def has_own_keys(tensors: Collection[str]) -> bool:
    """Whether all keys look like funcparam's own."""
    first = {key.partition(".")[0] for key in tensors}
    return first <= set(_OWN) and bool(first & {"raw", "state"})


def _scan_own(tensors: Mapping[str, Any]) -> Iterator[Stored]:
    for key in tensors:
        word, _, name = key.partition(".")
        yield Stored(name, "funcparam", ((word, key),))


def scan(tensors: Collection[str], names: Collection[str] = ()) -> list[Stored]:
    """Group keys by the tensor that they store; a key that is among `names` is that plain tensor.

    Ordered by where the first key of each stands.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key in tensors:
        name, style, part = _place(key, tensors, names)
        found.setdefault((name, style), {})[part] = key
    return [Stored(name, style, tuple(keys.items())) for (name, style), keys in found.items()]


def _place(key: str, keys: Collection[str], names: Collection[str]) -> tuple[str, str, str]:
    """The name, style and part that a key stands for."""
    if key in names:
        return key, "plain", ""
    if match := _TORCH.fullmatch(key):
        return match["prefix"] + match["local"], "torch", match["part"]
    for style, endings in _LEGACY:
        for ending in endings:
            name = key.removesuffix(ending)
            own = [name + other for other in endings]
            if (
                name.rpartition(".")[2]
                and name != key
                and all(o in keys and o not in names for o in own)
            ):
                return name, style, ending
    return key, "plain", ""


def key_of(name: str, style: str, part: str) -> str:
    """The key under which a part of a tensor is stored."""
    if style == "torch":
        prefix, dot, local = name.rpartition(".")
        return f"{prefix}{dot}parametrizations.{local}.{part}"
    return f"{name}{part}"


def half_legacy(key: str, names: Collection[str]) -> str | None:
    """The name of which `key` looks like a legacy part."""
    endings = [ending for _, endings in _LEGACY for ending in endings]
    return next((key.removesuffix(e) for e in endings if key.removesuffix(e) in names), None)


def what_is_there(tensors: Mapping[str, Any]) -> str:
    """What is there, and what to do about a wrapper's prefix."""
    keys = list(tensors)
    for prefix in ("module.", "_orig_mod."):
        if keys and all(key.startswith(prefix) for key in keys):
            return (
                f"every key starts with {prefix!r}, as wrappers add it: take the state_dict of"
                f" the module inside, or remove the prefix with key.removeprefix({prefix!r})"
            )
    return f"got the keys {keys[:4]}{' and more' if len(keys) > 4 else ''}"


def _shape(tensor: Any) -> str:
    return str(tuple(tensor.shape)) if isinstance(tensor, Tensor) else "extra state"
