"""The classes of shells, one for each class of networks."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from inspect import signature
from types import FunctionType
from typing import Any, cast

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LOOKS = ("__getitem__", "__len__", "__iter__", "__contains__")


@cache
def kind(base: type[nn.Module], net: type[nn.Module], call: FunctionType) -> type[Any]:
    """The class of shells of networks of a class, whose `forward` has the network's signature.

    Trainers look there for what a model takes. Equal models have equal types. Containers of modules
    are looked into as they are.

    Args:
        base: the class of shells.
        net: the class of networks.
        call: the `forward` of which a copy gets the signature; one that a subclass wrote is kept.
    """
    own: dict[str, Any] = {"_base": base, "_made_for": net, "__module__": base.__module__}
    if base.forward is call:
        forward = FunctionType(call.__code__, call.__globals__, "forward")
        forward.__doc__ = net.forward.__doc__ or call.__doc__
        with suppress(TypeError, ValueError):  # some are made in C
            cast("Any", forward).__signature__ = signature(net.forward)
        own["forward"] = forward
    if issubclass(net, _CONTAINERS):
        own |= {name: _of_the_network(name) for name in _LOOKS if hasattr(net, name)}
    return type(f"{base.__name__}[{net.__name__}]", (base,), own)


def _of_the_network(name: str) -> Any:
    def look(self: Any, *args: Any) -> Any:
        return getattr(self.net, name)(*args)

    look.__name__ = name
    return look
