"""The places of ruled weights in the network of a shell: `None` between calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from operator import contains, getitem, is_, is_not
from typing import Any, cast

from torch import nn
from typing_extensions import Never

from funcparam.binding.locks import lock_of
from funcparam.binding.places import Place, Places
from funcparam.binding.watch import expect_unwritten, is_bound

_get = cast("Any", dict.get)


class Slots:
    """Where the values of a shell go, looked up once and looked at again before each call.

    Args:
        net: the network.
        ties: all names of each ruled weight.
    """

    def __init__(self, net: nn.Module, ties: Sequence[tuple[str, ...]]) -> None:
        self.net = net
        self.lock = lock_of(net, net.modules())
        self.at = {names[0]: places(net, names) for names in ties}
        self.every = self._of(list(self.at))
        self._others: Places | None = None
        every = (step for names in ties for name in names for step in steps(net, name))
        links = {(id(parent), key): (parent, key, child) for parent, key, child in every}
        self._tables = [vars(parent)["_modules"] for parent, _, _ in links.values()]
        self._keys = [key for _, key, _ in links.values()]
        self._children = [child for _, _, child in links.values()]
        every_place = [place for own in self.at.values() for place in own]
        self._owners = [vars(place.owner) for place in every_place]
        self._kinds = [place.table for place in every_place]

    def is_as_it_was(self, net: nn.Module) -> bool:
        """Whether all is where it was."""
        if net is not self.net:
            return False
        try:
            children = list(map(getitem, self._tables, self._keys))
        except KeyError:
            return False
        tables = map(getitem, self._owners, self._kinds)
        return all(map(is_, children, self._children)) and all(map(is_, tables, self.every.tables))

    def expect_empty(self) -> None:
        """Raise if somebody wrote to a slot, whose tensor would be neither used nor kept."""
        expect_unwritten(self.net)
        tables, keys = self.every.tables, self.every.keys
        found: list[Any] = list(map(_get, tables, keys))
        if not any(map(is_not, found, repeat(None))) and all(map(contains, tables, keys)):
            return
        for name, own in self.at.items():
            if any(place.key not in place.entries() for place in own):
                raise RuntimeError(_gone(name))
            if not is_bound(self.net) and any(place.read() is not None for place in own):
                refuse_write(name)

    def of(self, names: Sequence[str]) -> Places:
        """The places of those that are not made when they are read."""
        if self._others is None or self._others.names != names:
            self._others = self._of(names)
        return self._others

    def _of(self, names: Sequence[str]) -> Places:
        return Places(self.net, names, [self.at[name] for name in names])


def refuse_write(name: str) -> Never:
    """Raise since somebody wrote to the place of a value."""
    raise RuntimeError(
        f"{name!r} of this Parametrized's network was written to. Its value is computed: write to"
        " model.raw, or load it with model.load_state_dict"
    )


def the_one(name: str, there: Sequence[Any]) -> Any:
    """What is in all places of a value, into which somebody wrote."""
    if any(tensor is not there[0] for tensor in there):
        raise RuntimeError(
            f"{name!r} of this Parametrized's network was written to in one of its places, and not"
            " in the others, with which it is tied: write to all"
        )
    return there[0]


def places(net: nn.Module, names: Sequence[str]) -> list[Place]:
    """The slots of these names, those of a module that is there twice once."""
    found: dict[Any, Place] = {}
    for name in names:
        way = list(steps(net, name))
        owner, key = way[-1][2] if way else net, name.rpartition(".")[2]
        table = "_buffers" if key in vars(owner)["_buffers"] else "_parameters"
        path = ".".join([*(step[1] for step in way), key])
        found.setdefault((owner, key), Place(owner, table, key, path))
    return list(found.values())


def steps(net: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The way from a network to the owner of a tensor: module, key and child, one by one.

    It leads through wrappers, whose only child has what they are asked for.
    """
    parent = net
    *parts, key = name.split(".")
    for part in parts:
        for step in _through(parent, part, ("_modules",), name):
            yield step
            parent = step[2]
        child = vars(parent)["_modules"][part]
        yield parent, part, child
        parent = child
    yield from _through(parent, key, ("_parameters", "_buffers"), name)


def _through(
    module: nn.Module, key: str, tables: Sequence[str], name: str
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    while not any(key in vars(module)[table] for table in tables):
        children = list(vars(module)["_modules"].items())
        if len(children) != 1:
            raise RuntimeError(_gone(name))
        wrapped, child = children[0]
        yield module, wrapped, child
        module = child


def _gone(name: str) -> str:
    return (
        f"{name!r} is no more in the network of this Parametrized, but has a rule. Replace modules"
        " before the Parametrized is made, or make another one"
    )
