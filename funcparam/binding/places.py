"""Where the tensors of a network are, so that others can be put there and taken out again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import getitem, is_, itemgetter, setitem
from threading import RLock
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from funcparam.binding.locks import Several, lock_of
from funcparam.binding.recurrent import Recurrent

_values, _items = cast("Any", dict.values), cast("Any", dict.items)
_get = cast("Any", dict.get)
_tables: Any = itemgetter("_parameters", "_buffers", "_modules")


class Place(NamedTuple):
    """A module, and which of its tables has a tensor under which key."""

    owner: nn.Module
    table: str
    key: str
    path: str
    """The way there, and the key, joined by dots."""

    def entries(self) -> dict[str, Any]:
        """The table itself."""
        return vars(self.owner)[self.table]

    def read(self) -> Any:
        """What is there, by attributes that a compiler follows."""
        owner = cast("Any", self.owner)
        table = owner._parameters if self.table == "_parameters" else owner._buffers
        return table[self.key] if self.key in table else getattr(owner, self.key)

    def write(self, tensor: Any) -> None:
        """Put a tensor there, likewise."""
        owner = cast("Any", self.owner)
        table = owner._parameters if self.table == "_parameters" else owner._buffers
        table[self.key] = tensor


class Places:
    """The places of the tensors of some names: one for each, and those that share it.

    Args:
        net: the network.
        names: the names.
        found: all places of each. Names of one tie have equal ones.
    """

    def __init__(
        self, net: nn.Module, names: Sequence[str], found: Sequence[Sequence[Place]]
    ) -> None:
        self.net = net
        self.names = list(names)
        self.repeated: list[tuple[int, int]] = []
        first: dict[Place, int] = {}
        self._sources: list[int] = []
        places: list[Place] = []
        for i, own in enumerate(found):
            if own[0] in first:
                self.repeated.append((i, first[own[0]]))
                continue
            first.update(dict.fromkeys(own, i))
            places += own
            self._sources += [i] * len(own)
        self._one_each = self._sources == list(range(len(self.names)))
        self.tables = [place.entries() for place in places]
        self.keys = [place.key for place in places]
        self._rnns = Recurrent(place.owner for place in places)

    def take(self) -> tuple[list[Any], list[Any]]:
        """Read what is there, and what recurrent layers keep beside it."""
        return list(map(getitem, self.tables, self.keys)), self._rnns.take()

    def put(self, tensors: list[Any]) -> None:
        """Write one tensor for each name."""
        if not self._one_each:
            tensors = [tensors[i] for i in self._sources]
        deque(map(setitem, self.tables, self.keys, tensors), maxlen=0)
        self._rnns.renew()

    def put_back(self, taken: tuple[list[Any], list[Any]]) -> None:
        """Write what `take` read."""
        deque(map(setitem, self.tables, self.keys, taken[0]), maxlen=0)
        self._rnns.put_back(taken[1])

    def agree(self, tensors: list[Any]) -> bool:
        """Whether the names of each tie have one tensor."""
        return all(tensors[i] is tensors[j] for i, j in self.repeated)

    def there(self) -> list[list[Any]]:
        """What is in each place of each name; None in one that was deleted."""
        found: list[list[Any]] = [[] for _ in self.names]
        for table, key, i in zip(self.tables, self.keys, self._sources, strict=True):
            found[i].append(_get(table, key))
        return found

    def written(self, tensors: list[Any]) -> Iterator[tuple[str, Any]]:
        """The names with another tensor in their first place than was put there."""
        try:
            found = list(map(getitem, self.tables, self.keys))
        except KeyError:  # the network has deleted one
            found: list[Any] = list(map(_get, self.tables, self.keys))
        if self._one_each and all(map(is_, found, tensors)):
            return
        firsts: dict[int, int] = {}
        for place, i in enumerate(self._sources):
            firsts.setdefault(i, place)
        firsts |= {i: firsts[j] for i, j in self.repeated}
        for i, place in firsts.items():
            if found[place] is not tensors[i] and self.keys[place] in self.tables[place]:
                yield self.names[i], found[place]


class Tree:
    """All places of a network, looked up once, and looked at again before each call."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        named = cast("Iterator[tuple[str, nn.Module]]", net.named_modules(remove_duplicate=False))
        tree = list(named)
        is_plain = all(_is_plain(module) for _, module in tree)
        self._is_plain = is_plain and not isinstance(net, nn.DataParallel)
        if not self._is_plain:
            tree = []  # a part is scripted, and nothing is proven of it
        items: Any = _plain_items if torch.compiler.is_compiling() else _items
        modules: dict[int, dict[str, Any]] = {}
        holder: dict[str, int] = {}
        kept: dict[int, list[Place]] = {}
        for path, module in tree:
            for table in ("_parameters", "_buffers"):
                for key, tensor in items(vars(module)[table]):
                    if tensor is None:
                        continue
                    name = f"{path}.{key}" if path else key
                    holder[name] = id(tensor)
                    if id(module) not in modules:
                        kept.setdefault(id(tensor), []).append(Place(module, table, key, name))
            modules[id(module)] = vars(module)
        self.at = {name: kept[tensor] for name, tensor in holder.items()}
        self._owners = [module for _, module in tree]
        self._lock: RLock | Several | None = None
        self._last: Places | None = None
        self._modules = list(modules.values())
        compiling = torch.compiler.is_compiling()  # which looks at every table by itself
        self._tables, self._entries = ([], []) if compiling else self._picture()

    @property
    def lock(self) -> RLock | Several:
        """What a thread holds that puts others there; compilers ask for none."""
        if self._lock is None:
            self._lock = lock_of(self.net, self._owners)
        return self._lock

    def is_as_it_was(self) -> bool:
        """Whether all is where it was."""
        tables, entries = self._picture()
        if len(tables) != len(self._tables) or entries != self._entries:
            return False
        return all(map(is_, tables, self._tables))

    def places(self, names: list[str]) -> Places | None:
        """Those of some names; None if one of them has none."""
        if self._last is None or self._last.names != names:
            if not (self._is_plain and self.at.keys() >= set(names)):
                return None
            self._last = Places(self.net, names, [self.at[name] for name in names])
        return self._last

    def _picture(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """All on which the places depend: the tables that hold something, what, and its keys."""
        tables: Any = chain.from_iterable(map(_tables, self._modules))
        filled: list[dict[str, Any]] = list(filter(None, tables))  # of the rest nothing depends
        entries = cast("Any", chain.from_iterable(map(_values, filled)))
        return filled, [*map(id, entries), *chain.from_iterable(filled)]


def _plain_items(table: dict[str, Any]) -> Any:
    """For a compiler, which knows no table whose entries are made when they are read."""
    return table.items()


def _is_plain(module: nn.Module) -> bool:
    own = vars(module)
    return all(isinstance(own.get(t), dict) for t in ("_parameters", "_buffers", "_modules"))
