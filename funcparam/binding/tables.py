"""Tables of parameters whose values are made when they are read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from funcparam.binding.places import Place
from funcparam.binding.recurrent import renewed

_get, _keys = cast("Any", dict.__getitem__), cast("Any", dict.keys)

Read = Callable[[str, nn.Module], Tensor]
"""From the name of a leaf, and the module that reads it, to its value."""


class Table(MutableMapping[str, Any], dict[str, Any]):  # pyright: ignore
    """A module's `_parameters` during a call: some of its entries are made at each read.

    A dict for those who ask. All that reads entries goes through `__getitem__`; what copies a dict
    past it is kept from that by an `__iter__` of our own. An entry that is assigned to is as usual.
    """

    def __init__(self, owner: nn.Module, later: dict[str, str], read: Read) -> None:
        dict.__init__(self, owner._parameters)  # pyright: ignore[reportPrivateUsage]
        self._owner = owner
        self._later = later
        self._read = read

    def __getitem__(self, key: str) -> Any:
        name = self._later.get(key)
        return _get(self, key) if name is None else self._read(name, self._owner)

    def __setitem__(self, key: str, value: Any) -> None:
        self._later.pop(key, None)
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str) -> None:
        self._later.pop(key, None)
        dict.__delitem__(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(_keys(self))

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key)

    def __len__(self) -> int:
        return dict.__len__(self)

    def copy(self) -> dict[str, Any]:
        """All entries, made now."""
        return dict(self)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


@contextmanager
def read_later(places: Sequence[tuple[str, Place]], read: Read) -> Generator[None]:
    """Let the parameters of these names and places be made by `read` inside the block."""
    later: dict[nn.Module, dict[str, str]] = {}
    for name, place in places:
        later.setdefault(place.owner, {})[place.key] = name
    before = [(vars(module), module._parameters) for module in later]  # pyright: ignore
    try:
        for module, names in later.items():
            vars(module)["_parameters"] = Table(module, names, read)
        with renewed(later):
            yield
    finally:
        for own, table in before:
            own["_parameters"] = table
