"""The tensors of one call, put in the places of a network and taken out again."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from funcparam.binding import watch
from funcparam.binding.locks import Several
from funcparam.binding.places import Place, Places
from funcparam.binding.recompute import version
from funcparam.binding.recurrent import renewed
from funcparam.binding.slots import the_one

if TYPE_CHECKING:
    from funcparam.binding.reading import Reading


class Binding:
    """A block in which a network has the tensors of one call in the place of its own.

    The same thread may bind again, inside. A checkpoint in the block takes the binding along: see
    `watch`.

    Args:
        lock: the network's, which this thread has for as long.
        places: where the tensors go.
        tensors: one for each name of `places`.
        reading: more of them, which are made when the network reads them.
    """

    def __init__(
        self,
        lock: RLock | Several,
        places: Places,
        tensors: list[Any],
        reading: Reading | None = None,
    ) -> None:
        self._lock = lock
        self.places = places
        self.tensors = tensors
        self._reading = reading
        self._taken: Any = None
        self._block: ExitStack | None = None
        self._before: list[tuple[int, Any]] | None = None

    def __enter__(self) -> Self:
        self._taken = self.places.take()
        self.places.put(self.tensors)
        if self._reading is not None:
            self._block = self._reading.block()
        watch.push(self)
        return self

    def __exit__(self, *_: object) -> None:
        watch.pop()
        if self._block is not None:
            self._block.close()
        self.places.put_back(self._taken)
        self._taken = None

    def watch_writes(self) -> None:
        """From now on, know what the network writes."""
        self._before = self._marks()

    def written(self) -> dict[str, Any]:
        """What was put in the place of a value, and values that were written to.

        What is differentiated is part of a computation, and no write.

        Raises:
            RuntimeError: it is not clear what was written.
        """
        if self._before is None:
            return {}
        marked = zip(self.places.names, self.tensors, self._before, self._marks(), strict=True)
        found = {name: value for name, value, old, new in marked if old != new and old[1] is new[1]}
        for name, value, there in zip(
            self.places.names, self.tensors, self.places.there(), strict=True
        ):
            if any(tensor is not value for tensor in there):
                found[name] = the_one(name, there)
        return found if self._reading is None else found | self._reading.written()

    def last_written(self) -> dict[str, Any]:
        """The same, at the end of the block."""
        written = self.written()
        self._before = None
        return written

    def _marks(self) -> list[tuple[int, Any]]:
        """How often each value was written to, and what it was made by."""
        return [(version(t), t.grad_fn) for t in self.tensors]

    @contextmanager
    def again(self, instead: Mapping[int, Tensor]) -> Generator[None]:
        """The same once more, with other tensors in the place of those of some ids.

        While the block itself runs, backward inside of it has what its thread locked, on whatever
        thread it is.
        """
        tensors = [instead.get(id(t), t) for t in self.tensors] if instead else self.tensors
        reading = None if self._reading is None else self._reading.again()
        waits = self._taken is None
        if waits:
            self._lock.acquire()
        try:
            with Binding(self._lock, self.places, tensors, reading):
                yield
        finally:
            if waits:
                self._lock.release()


@contextmanager
def traced(found: Sequence[tuple[Tensor, Place]]) -> Generator[None]:
    """The same for a compiler, which follows every table, takes no lock and knows checkpoints."""
    before = [place.read() for _, place in found]
    try:
        for tensor, place in found:
            place.write(tensor)
        with renewed([place.owner for _, place in found]):
            yield
    finally:
        for (_, place), tensor in zip(found, before, strict=True):
            place.write(tensor)


def call_traced(
    net: nn.Module,
    found: Sequence[tuple[Tensor, Place]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Tensor]]:
    """A call in it, which may be in a checkpoint: compilers let PyTorch's own write there.

    Returns:
        What the network returns, and what is in each place afterwards.
    """
    tensors = {place.path: tensor for tensor, place in found}
    with renewed([place.owner for _, place in found]):
        out = torch.func.functional_call(net, tensors, args, kwargs, tie_weights=False)
    return out, tensors
