from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


class Readings:
    """Whose the values are that were read and are still there, while somebody asks for them.

    A value itself cannot say it: what is written on it would be saved and copied with it.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._known: Any = WeakIdKeyDictionary()

    def add(self, value: Tensor, module: nn.Module, name: str, besides: Iterable[object]) -> None:
        """Remember, as long as `value` is there, that it was read from `module.<name>`.

        Not if it is one of `besides`: raw itself needs no writing back, and could not be swapped
        if there were a weak reference to it.
        """
        if all(value is not raw for raw in besides):
            self._known[value] = ref(module), name

    def whose(self, value: Tensor) -> tuple[nn.Module, str] | None:
        """The module and the name that `value` was read from."""
        if value not in self._known:
            return None
        module, name = self._known[value]
        return None if module() is None else (module(), name)


READINGS = Readings()
