"""What a checkpoint holds for a parametrization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from funcparam.parametrization.parametrization import Parametrization
from funcparam.transforms.contract.base import Raw, State
from funcparam.transforms.contract.signature import NamedSpecs, TensorSpec


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds for a parametrization; unpacks to `raw, state, others`.

    Attributes:
        raw: as [`Parametrization.init`][funcparam.Parametrization.init] returns it.
        state: likewise.
        others: what is none of the parametrization's: the network's buffers, under the network's
            names.
        p: the parametrization.
        missing: the names of which nothing is there; none unless `strict=False`.
        moved: of the weights that did not satisfy their constraint and were projected onto it, how
            far the entry went that moved most.
        keys: the key in the file of each of `others`.
    """

    raw: dict[str, Raw]
    state: dict[str, State]
    others: dict[str, Any]
    p: Parametrization[Any]
    missing: tuple[str, ...]
    moved: Mapping[str, float]
    keys: Mapping[str, str]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter((self.raw, self.state, self.others))


def cast_to_specs(contents: Contents) -> Contents:
    """The contents in the dtypes of the parametrization."""
    raw, state = dict(contents.raw), dict(contents.state)
    for entry in contents.p.entries:
        if entry.name in raw:
            raw[entry.name] = _cast(raw[entry.name], entry.signature.raw)
        if entry.name in state:
            state[entry.name] = _cast(state[entry.name], entry.signature.state)
    return replace(contents, raw=raw, state=state)


def copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary of tensors, or of dictionaries of tensors, in memory of its own."""

    def copy(item: Any) -> Any:
        return item.detach().clone() if isinstance(item, Tensor) else deepcopy(item)

    return {
        name: {key: copy(t) for key, t in cast("Mapping[str, Any]", item).items()}
        if isinstance(item, Mapping)
        else copy(item)
        for name, item in tree.items()
    }


def _cast(tensors: Any, spec: TensorSpec | NamedSpecs) -> Any:
    if isinstance(spec, TensorSpec):
        return tensors.to(spec.dtype) if isinstance(tensors, Tensor) else tensors
    given = cast("Mapping[str, Tensor]", tensors)
    return {key: given[key].to(own.dtype) for key, own in spec if key in given}
