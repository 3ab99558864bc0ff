"""Threads that bind take turns, in every module that two of their networks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from threading import Lock, RLock
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

# Past the modules, whose copies and pickles know nothing of it.
_locks: WeakKeyDictionary[nn.Module, tuple[int, RLock]] = WeakKeyDictionary()
_numbers = count()
_registering = Lock()


@dataclass(frozen=True)
class Several:
    """The locks of parts that were in different networks before they were in one."""

    locks: tuple[RLock, ...]

    def acquire(self) -> None:
        """Take all, in the one order that all threads keep."""
        for lock in self.locks:
            lock.acquire()

    def release(self) -> None:
        """Give all back."""
        for lock in reversed(self.locks):
            lock.release()


class Looked(Protocol):
    """What was looked up of a network, and may have to be looked up again."""

    @property
    def lock(self) -> RLock | Several:
        """That of the network as it was."""
        ...


L = TypeVar("L", bound=Looked)


def lock_of(net: nn.Module, modules: Iterable[nn.Module]) -> RLock | Several:
    """What a thread holds while a network with these modules has tensors that are not its own.

    One lock for all; but a module keeps the one that it got in another network.
    """
    owners = [net, *filter(_has_tensors, modules)]
    with _registering:
        known = sorted({_locks[owner] for owner in owners if owner in _locks})
        new = known[0] if known else (next(_numbers), RLock())
        for owner in owners:
            _locks.setdefault(owner, new)
    return Several(tuple(lock for _, lock in known)) if len(known) > 1 else new[1]


def hold(last: L, look: Callable[[], L]) -> L:
    """Take the lock of a network, which is the one of how it looks once the lock is taken."""
    while True:
        lock = last.lock
        lock.acquire()
        try:
            found = look()
        except BaseException:
            lock.release()
            raise
        if found.lock is lock or found.lock == lock:
            return found
        lock.release()
        last = found


def _has_tensors(module: nn.Module) -> bool:
    own: dict[str, Any] = vars(module)
    return bool(own.get("_parameters") or own.get("_buffers"))
