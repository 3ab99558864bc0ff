"""Modules that would compute without a word where their weight is missing, made to say so."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import nn

from funcparam.binding.places import Place

_KEY = "funcparam"

_LOUD = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.RNNBase),
    nn.modules.conv._ConvNd,  # pyright: ignore[reportPrivateUsage]
)
"""Layers that cannot do without their weight; without a bias or a scale many can."""


def guard(places: Iterable[Place]) -> None:
    """Let the owners fail where they are called and nothing is bound."""
    keys: dict[nn.Module, list[str]] = {}
    for place in places:
        if not (isinstance(place.owner, _LOUD) and place.key.startswith("weight")):
            keys.setdefault(place.owner, []).append(place.key)
    for owner, own in keys.items():
        owner._forward_pre_hooks[_KEY] = _expecting(tuple(own))  # pyright: ignore


def unguard(net: nn.Module) -> None:
    """Take away what `guard` left."""
    for module in net.modules():
        module._forward_pre_hooks.pop(_KEY, None)  # pyright: ignore


class _Expecting:
    """A hook before `forward` that wants these to be there."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys

    def __call__(self, module: nn.Module, _: Any) -> None:
        for key in self.keys:
            if getattr(module, key) is None:
                raise RuntimeError(
                    f"{key!r} of this {type(module).__name__} is computed by a Parametrized. Call"
                    " that, or its methods, or this in `with model.bound() as net:`"
                )

    def __reduce__(self) -> Any:
        return _expecting, (self.keys,)


@cache  # one for equal keys, so that equal shells are one graph to a compiler
def _expecting(keys: tuple[str, ...]) -> _Expecting:
    return _Expecting(keys)
