"""What a shell has not, its network has: attributes and methods."""

from __future__ import annotations

from functools import wraps
from inspect import ismethod
from typing import Any, cast

from torch import nn

from funcparam.binding.layers import owner_of
from funcparam.binding.shell import Shell


def get(shell: Shell, net: nn.Module, name: str) -> Any:
    """The network's attribute; its methods run with the values in place."""
    found = getattr(net, name)
    if found is None and _is_ruled(shell, name):
        return shell.values()[name]
    if not (ismethod(found) and owner_of(found) is net):
        return found

    @wraps(found)
    def method(*args: Any, **kwargs: Any) -> Any:
        with shell.bound() as net:
            return getattr(net, name)(*args, **kwargs)

    return method


def put(shell: Any, name: str, value: Any) -> bool:
    """Set the network's attribute, if it has one and the shell itself has none of that name.

    Returns:
        Whether it was set there.

    Raises:
        AttributeError: it is a weight that has a rule, or a module.
    """
    net = cast("Any", vars(shell)).get("_modules", {}).get("net")
    if net is None or _has(shell, name) or not hasattr(net, name):
        return False
    if _is_ruled(shell, name):
        raise AttributeError(
            f"{name!r} of this Parametrized's network has a rule, so its value is computed."
            f" Load another one: model.load_state_dict({{{name!r}: value}}, strict=False)"
        )
    if isinstance(getattr(net, name), nn.Module):
        raise AttributeError(
            f"{name!r} is a module of this Parametrized's network, of which the parametrization"
            " knows the parameters. Replace modules before the Parametrized is made, or make"
            " another one"
        )
    setattr(net, name, value)
    return True


def _has(module: nn.Module, name: str) -> bool:
    own = vars(module)
    tables = (own, own["_parameters"], own["_buffers"], own["_modules"])
    return any(name in table for table in tables) or hasattr(type(module), name)


def _is_ruled(shell: Shell, name: str) -> bool:
    entries = shell.parametrization.entries
    return any(name in entry.names and entry.transform is not None for entry in entries)
