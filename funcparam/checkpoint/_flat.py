"""The tensors of a state_dict, however it is nested, under dotted keys."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor

from funcparam.transforms.contract.signature import describe


def flat(tensors: Any) -> dict[str, Any]:
    """The tensors of a state_dict, or of nested dictionaries, under dotted keys.

    Raises:
        TypeError: something else than a tensor is in it, apart from modules' extra state.
        ValueError: two tensors have one dotted key, or the dictionaries never end.
    """
    found, foreign = tensors_and_others(tensors)
    expect_tensors(foreign)
    return found


def tensors_and_others(tensors: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors, and apart from them whatever else is there, as in a training checkpoint."""
    if not isinstance(tensors, Mapping):
        got, hint = describe(tensors), ""
        if isinstance(tensors, (str, os.PathLike)):
            hint = ". checkpoint.load(path) reads a file, save(tensors, path) writes one"
        elif hasattr(tensors, "state_dict"):
            hint = ". Pass its state_dict()"
        raise TypeError(f"expected a dict of tensors, by key; got {got}{hint}")
    found: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    try:
        for key, item in _flat(cast("Mapping[Any, Any]", tensors), ""):
            if key in found or key in foreign:
                raise ValueError(f"{key!r} is there twice, as one key and as nested dictionaries")
            is_ours = isinstance(item, Tensor) or key.endswith("_extra_state")
            (found if is_ours else foreign)[key] = item
    except RecursionError:
        raise ValueError(
            "expected a dict of tensors, by key; got dictionaries that are nested without end"
        ) from None
    return found, foreign


def metadata_of(tensors: Any) -> dict[str, Any]:
    """What nested state_dicts say of themselves, by the path to each.

    Theirs is the attribute `_metadata`, which `torch.save` keeps and a copy by `dict` has lost.
    """
    found: dict[str, Any] = {}
    for path, item in _dictionaries(tensors, ""):
        if isinstance(own := getattr(item, "_metadata", None), Mapping):
            found[path] = own
    return found


def _dictionaries(tensors: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tensors, Mapping):
        yield path, tensors
        for key, item in cast("Mapping[Any, Any]", tensors).items():
            yield from _dictionaries(item, f"{path}{key}.")


def expect_tensors(foreign: Mapping[str, Any]) -> None:
    """Raise for the first thing that is no tensor."""
    for key, item in foreign.items():
        raise TypeError(
            f"{key!r}: expected a tensor; got {describe(item)}. Of a training checkpoint, pass the"
            " entry that holds the state_dict"
        )


def _flat(tensors: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, item in tensors.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping) and not path.endswith("_extra_state"):
            yield from _flat(cast("Mapping[Any, Any]", item), f"{path}.")
        else:
            yield path, item
