"""What a file says of itself: the transforms with their configuration, as JSON.

It stands in `state_dict._metadata`, where PyTorch keeps the versions of modules, and in the header
of safetensors. It adds no key, and nothing that it names is imported.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch

import funcparam.transforms
from funcparam.checkpoint._flat import metadata_of
from funcparam.checkpoint._wrappers import bare_name
from funcparam.parametrization.boundary import Entry
from funcparam.parametrization.parametrization import Parametrization
from funcparam.transforms.contract.base import AnyTransform, Transform
from funcparam.transforms.contract.function import Function
from funcparam.transforms.contract.signature import Signature, TensorSpec, describe, signature

KEY = "funcparam"
_VERSION = 1

Known: TypeAlias = Mapping[str, Any]
"""Classes and functions that a file may name, beside funcparam's own."""


class AsJson(dict["AnyTransform | None", Any]):
    """Transforms as JSON, each of which is worked out once."""

    def __missing__(self, transform: AnyTransform | None) -> Any:
        self[transform] = _as_json(transform)
        return self[transform]


@dataclass(frozen=True)
class Said:
    """What a file says of one tensor."""

    names: tuple[str, ...]
    value: TensorSpec
    transform: Any
    """As JSON; None if it has none."""

    def entry(self, known: Known) -> Entry:
        """Make the entry that wrote it.

        Raises:
            ValueError: its class is neither funcparam's nor in `known`, or does not take the
                arguments or the shape.
        """
        try:
            made = _made(self.transform, known)
            if made is not None and not isinstance(made, Transform):
                raise ValueError(f"the file has {self.transform!r} where a transform is due")
        except ValueError as error:
            raise ValueError(f"{self.names[0]!r}: {error}") from error
        transform = cast("AnyTransform | None", made)
        return Entry(self.names, _signature(self.names, transform, self.value), transform)


def description(p: Parametrization[Any]) -> str:
    """Say as JSON what makes raw and state into values: names, shapes, dtypes, transforms.

    Example:
        >>> import json, torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> p = fp.parametrize({"w": torch.ones(3, 2)}, {"w": WeightNorm()})
        >>> json.loads(fp.checkpoint.description(p))["leaves"][0]["transform"]
        {'class': 'WeightNorm', 'dim': 0}
    """
    spelt = AsJson()
    leaves = [
        {
            "names": entry.names,
            "shape": entry.signature.value.shape,
            "dtype": str(entry.signature.value.dtype).removeprefix("torch."),
            "transform": spelt[entry.transform],
        }
        for entry in p.entries
    ]
    return json.dumps({"version": _VERSION, "leaves": leaves})


def said(state_dict: Any) -> dict[str, Said]:
    """What a file says of each tensor, by each of its names; {} if nothing.

    Raises:
        ValueError: it is not what [`description`][funcparam.checkpoint.description] writes.
    """
    found: dict[str, Said] = {}
    for nested, metadata in metadata_of(state_dict).items():
        for path, of_module in metadata.items():
            own = cast("Mapping[Any, Any]", of_module if isinstance(of_module, Mapping) else {})
            text = own.get(KEY)
            if text is not None:
                for one in _parsed(text, f"{path}." if path else ""):
                    found |= {f"{nested}{name}": one for name in one.names}
    return found


def parametrization(state_dict: Any, *, known: Known | None = None) -> Parametrization[Any]:
    """Make the parametrization that a file was written with, from the file alone.

    Args:
        state_dict: as [`load`][funcparam.checkpoint.load], `torch.load` or `model.state_dict()`
            return it; a copy by `dict(state_dict)` has lost what the file says.
        known: classes and functions of your own that the file names, by that name, as
            `{"mine.transforms:Squared": Squared}`. Nothing is imported from a file.

    Raises:
        ValueError: the file does not say it; or a class is neither funcparam's nor in `known`.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": WeightNorm()})
        >>> file = fp.checkpoint.write(p, *p.init(net))
        >>> fp.checkpoint.parametrization(file) == p
        True
    """
    found = said(state_dict)
    if not found:
        raise ValueError(
            "the file does not say which transforms it was written with: give p, made by"
            " fp.parametrize(net, rules). Files that checkpoint.save, or torch.save(state_dict) of"
            " a Parametrized, wrote with this version or a later one say it"
        )
    entries: dict[str, Entry] = {}
    for one in {id(one): one for one in found.values()}.values():
        entry = one.entry(known or {})
        entry = replace(entry, names=tuple(map(bare_name, entry.names)))
        if entry.name in entries:
            raise ValueError(
                f"the file says twice what {entry.name!r} is: pass the part that is meant"
            )
        entries[entry.name] = entry
    return Parametrization(tuple(entries.values()), None)


def in_header(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What modules say, as an entry for the header of safetensors."""
    told = {path: own[KEY] for path, own in metadata.items() if KEY in own}
    return {KEY: json.dumps(told)} if told else {}


def of_header(header: Mapping[str, str]) -> dict[str, Any]:
    """The way back; what something else wrote under the same key is left to who reads it."""
    if KEY not in header:
        return {}
    try:
        told = json.loads(header[KEY])
    except (json.JSONDecodeError, RecursionError):
        told = None
    if not isinstance(told, dict):
        return {"": {KEY: header[KEY]}}
    return {path: {KEY: text} for path, text in cast("dict[str, Any]", told).items()}


def _as_json(x: Any) -> Any:
    """A transform, or an argument of one."""
    if isinstance(x, Transform):
        return _call_as_json(cast("Any", x))
    if isinstance(x, (tuple, list)):
        return [_as_json(y) for y in cast("tuple[Any, ...]", x)]
    if isinstance(x, float) and not math.isfinite(x):
        return {"number": str(x)}
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    return {"object": _name(x if hasattr(x, "__qualname__") else type(x))}


def _call_as_json(x: Any) -> dict[str, Any]:
    """A class and its arguments, which are attributes of what was made with them."""
    kind = cast("Any", type(x))
    arguments = [name for name in inspect.signature(kind).parameters if hasattr(x, name)]
    return {"class": _name(kind), **{a: _as_json(getattr(x, a)) for a in arguments}}


def _name(x: Any) -> str:
    """What a class or a function is called: by its name alone if it is funcparam's."""
    if x is Function:
        return "transform"
    name = x.__qualname__
    return name if class_called(name) is x else f"{x.__module__}:{name}"


def class_called(name: str) -> Any:
    """The transform of funcparam's that has a name; None if there is none."""
    if name == "transform":
        return Function
    public = name in funcparam.transforms.__all__
    found: Any = getattr(funcparam.transforms, name) if public else None
    return found if isinstance(found, type) else None


def _made(x: Any, known: Known) -> Any:
    """What JSON spells; nothing is imported."""
    if isinstance(x, list):
        return tuple(_made(y, known) for y in cast("list[Any]", x))
    if not isinstance(x, dict):
        return x
    told = cast("dict[str, Any]", x)
    if told.keys() == {"number"}:
        return float(told["number"])
    name = told.get("class", told.get("object"))
    made = known.get(name) if isinstance(name, str) else None
    if isinstance(name, str) and made is None:
        made = class_called(name)
    if made is None:
        raise ValueError(
            f"the file names {name!r}, which is not funcparam's: give it,"
            f" known={{{name!r}: ...}}. Nothing is imported from a file"
        )
    if "object" in told:
        return made
    arguments = {key: _made(item, known) for key, item in told.items() if key != "class"}
    try:
        return _called(made, arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the file names {name!r} with {arguments}, but {error}") from error


def _called(made: Any, arguments: dict[str, Any]) -> Any:
    """Call a class with its arguments, some of which it may take one by one."""
    several: tuple[Any, ...] = ()
    for name, parameter in inspect.signature(made).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL and name in arguments:
            several = arguments.pop(name)
    return made(*several, **arguments)


def _signature(
    names: tuple[str, ...], transform: AnyTransform | None, spec: TensorSpec
) -> Signature:
    try:
        return signature(transform, spec)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{names[0]!r}: the file says {spec}, but {error}") from error


def _parsed(text: Any, prefix: str) -> Iterator[Said]:
    try:
        told = json.loads(text)
        version, leaves = told["version"], told["leaves"]
        if version > _VERSION:
            raise ValueError(
                f"the file was written by a newer funcparam, in version {version} of what files"
                f" say; this one knows {_VERSION}: upgrade funcparam"
            )
        for leaf in leaves:
            dtype = getattr(torch, leaf["dtype"])
            shape = tuple(leaf["shape"])
            names = tuple(f"{prefix}{name}" for name in leaf["names"])
            if not (names and isinstance(dtype, torch.dtype) and all(map(_is_size, shape))):
                raise TypeError(leaf)
            yield Said(names, TensorSpec(shape, dtype), leaf["transform"])
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"what the file says of itself under {KEY!r} is not what funcparam writes; got"
            f" {describe(text) if not isinstance(text, str) else repr(text[:80])}"
        ) from error


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48
