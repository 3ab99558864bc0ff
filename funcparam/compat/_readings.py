from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import Tensor, nn


class Reading:
    """Whose a value is that was read."""

    def __init__(self, value: Tensor, module: nn.Module, name: str, forget: Any) -> None:
        self.value, self.module, self.name = ref(value, forget), ref(module), name


class Readings:
    """The values that were read and are still there, while somebody asks for them.

    A value itself cannot say whose it is: what is written on it would be saved and copied with it.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._known: dict[int, Reading] = {}

    def add(self, value: Tensor, module: nn.Module, name: str, besides: Iterable[object]) -> None:
        """Remember, as long as `value` is there, that it was read from `module.<name>`.

        Not if it is one of `besides`: raw itself needs no writing back, and could not be swapped
        if there were a weak reference to it.
        """
        if any(value is raw for raw in besides):
            return
        key = id(value)

        def forget(_: object) -> None:
            self._known.pop(key, None)

        self._known[key] = Reading(value, module, name, forget)

    def whose(self, value: Tensor) -> tuple[nn.Module, str] | None:
        """The module and the name that `value` was read from."""
        reading = self._known.get(id(value))
        if reading is None or reading.value() is not value:
            return None
        module = reading.module()
        return None if module is None else (module, reading.name)


READINGS = Readings()
