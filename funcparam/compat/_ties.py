"""Which other module holds the same parameter: a module alone cannot know that it is tied."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from funcparam.compat import _private


def other_owner(tensor: Tensor, *places: tuple[nn.Module, str]) -> str | None:
    """In words, a module besides `places` of which `tensor` is a parameter or a buffer.

    All objects are looked through, which takes a while: ask `may_be_tied` first.
    """
    if not any(place not in places for place in _owners(tensor)):
        return None
    gc.collect()  # what nobody holds is no owner
    for module, name in _owners(tensor):
        if (module, name) not in places:
            return f"'{name}' of {type(module).__name__}({module.extra_repr()})"
    return None


@_private.not_compiled("references to a parameter are counted")
def may_be_tied(module: nn.Module, name: str) -> bool:
    """False if nothing but `module` holds the tensor; an optimizer or a variable may be it."""
    own: Any = vars(module)
    table = own["_parameters"] if name in own["_parameters"] else own["_buffers"]
    alone = {name: object()}
    return sys.getrefcount(table.get(name)) > sys.getrefcount(alone.get(name))


def _owners(tensor: Tensor) -> Iterator[tuple[nn.Module, str]]:
    for thing in gc.get_objects():
        if not issubclass(type(thing), nn.Module):
            continue
        module = cast("nn.Module", thing)
        for table in ("_parameters", "_buffers"):
            tensors = cast("dict[str, Any]", vars(module).get(table, {}))
            yield from ((module, name) for name, x in list(tensors.items()) if x is tensor)
