"""How each tensor of a checkpoint is stored, as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcparam.checkpoint._flat import tensors_and_others
from funcparam.checkpoint._keys import Stored, heads_of, scan, splits
from funcparam.checkpoint._spec import said
from funcparam.parametrization.table import Table, Tabular
from funcparam.transforms.contract.signature import describe


@dataclass(frozen=True, repr=False)
class Explanation(Tabular):
    """What [`explain`][funcparam.checkpoint.explain] found; prints as a table.

    Attributes:
        stored: one item for each tensor, with `name`, `style` and `keys`, pairs of part and key.
            `style` is `"plain"`, `"funcparam"`, `"torch"`, `"legacy weight_norm"`, `"legacy
            spectral_norm"` or `"legacy prune"`.
        transforms: by name, what the file says of the transforms that it was written with.
    """

    stored: tuple[Stored, ...]
    transforms: Mapping[str, str]
    _shapes: tuple[str, ...]

    def _table(self) -> Table:
        rows = [
            (
                found.name,
                found.style,
                self.transforms.get(found.name, ""),
                ", ".join(part for part, _ in found.keys),
                shapes,
            )
            for found, shapes in zip(self.stored, self._shapes, strict=True)
        ]
        head = ("name", "stored as", "transform", "parts", "shapes")
        if not self.transforms:
            head, rows = _without(2, head), [_without(2, row) for row in rows]
        return Table(head, tuple(rows))


def explain(state_dict: Mapping[str, Any]) -> Explanation:
    """Say how each tensor of a checkpoint is stored, and by which transform if it says so.

    This needs neither the network nor a parametrization. Keys that fit
    `torch.nn.utils.parametrize` (style `"torch"`), the older hooks of `weight_norm`,
    `spectral_norm` and `prune`, or funcparam's own layout are taken for it, all others for plain
    tensors. A folded weight is a plain one.

    Args:
        state_dict: tensors by key, as `state_dict()`, `torch.load` or
            [`load`][funcparam.checkpoint.load] return them.

    Raises:
        TypeError: it is not a dictionary.
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
    tensors, foreign = tensors_and_others(state_dict)
    told = said(state_dict)
    found = stored_in(tensors, told)
    shapes = [", ".join(_shape(tensors[key]) for _, key in item.keys) for item in found]
    found += [Stored(key, "no tensor", ()) for key in foreign]
    shapes += map(describe, foreign.values())
    transforms = {name: _call(one.transform) for name, one in told.items() if one.transform}
    return Explanation(tuple(found), transforms, tuple(shapes))


def stored_in(keys: Collection[str], told: Collection[str] = ()) -> list[Stored]:
    """Each tensor once; those of funcparam's modules under the names that the file says."""
    heads = heads_of(keys)
    grouped: dict[tuple[str, str], dict[str, str]] = {}
    foreign: list[str] = []
    for key in keys:
        place = next(((h, w, r) for h, w, r in splits(key) if h in heads), None)
        if place is None:
            foreign.append(key)
            continue
        head, word, rest = place
        name, inner = head + rest, ""
        while name not in told and len(name) > len(head) and told:
            name, _, last = name.rpartition(".")
            inner = f".{last}{inner}"
        if name not in told:
            name, inner = head + rest, ""
        grouped.setdefault((name, head), {})[f"{word}{inner}"] = key
    own = [
        Stored(name, "funcparam", tuple(parts.items()), head)
        for (name, head), parts in grouped.items()
    ]
    return [*own, *scan(foreign)]


def _call(told: Any) -> str:
    """A transform as it is called, from JSON."""
    if isinstance(told, list):
        return f"({', '.join(map(_call, told))})"  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(told, dict) and "class" in told:
        own = [f"{key}={_call(item)}" for key, item in told.items() if key != "class"]  # pyright: ignore
        return f"{told['class']}({', '.join(own)})"
    if isinstance(told, dict):
        return " ".join(map(str, told.values()))  # pyright: ignore[reportUnknownArgumentType]
    return repr(told)


def _without(i: int, row: tuple[str, ...]) -> tuple[str, ...]:
    return row[:i] + row[i + 1 :]


def _shape(tensor: Any) -> str:
    return str(tuple(tensor.shape)) if isinstance(tensor, Tensor) else "extra state"
