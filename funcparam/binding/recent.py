"""Things that are kept for a while: longer where they had to be made again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Recent(Generic[Item]):
    """Items that are made when they are asked for, and dropped when another owner asks.

    Time is counted in changes of owner. An item that has to be made again is from then on kept for
    twice as long as it was away, so that loops over a few owners settle: an item is made a number
    of times that grows with the logarithm of how often it is asked for.

    Args:
        spans: how long to keep the items of each name; it learns, and outlives this.
        is_droppable: whether an item could be made again as it is now.
    """

    def __init__(self, spans: dict[str, int], is_droppable: Callable[[Item], bool]) -> None:
        self._spans = spans
        self._is_droppable = is_droppable
        self._items: dict[Hashable, tuple[str, Item]] = {}
        self._last: dict[Hashable, int] = {}
        self._owner: Any = None
        self._now = 0

    def get(self, key: Hashable, name: str, owner: object, make: Callable[[], Item]) -> Item:
        """The item of `key`; what has had its time is dropped before another one is made."""
        if owner is not self._owner:
            self._owner = owner
            self._now += 1
            self._drop()
        if key not in self._items:
            if key in self._last:
                self._spans[name] = 2 * (self._now - self._last[key])
            self._items[key] = name, make()
        self._last[key] = self._now
        return self._items[key][1]

    def pop(self, key: Hashable) -> Item | None:
        """Take an item out, if it is there."""
        self._last.pop(key, None)
        found = self._items.pop(key, None)
        return None if found is None else found[1]

    def clear(self) -> None:
        """Drop everything."""
        self._items.clear()
        self._last.clear()

    def _drop(self) -> None:
        for key, (name, item) in list(self._items.items()):
            age = self._now - self._last[key]
            if age > self._spans.get(name, 0) and self._is_droppable(item):
                del self._items[key]
