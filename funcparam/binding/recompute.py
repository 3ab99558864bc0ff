"""Values that the graph does not keep: backward makes them again from raw and state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

Map = Callable[[Sequence[Tensor]], Tensor]
"""From raw and state, as one list, to the value with its graph."""

Item = TypeVar("Item")

_hooks_around: Callable[[bool], Any] = getattr(
    torch._C._autograd,  # pyright: ignore
    "_top_saved_tensors_default_hooks",
    lambda _: None,
)


class Recent(Generic[Item]):
    """Items that are made when they are asked for, and dropped when another owner asks.

    One that has to be made a second time, because owners take turns, is kept from then on.

    Args:
        is_droppable: whether an item could be made again as it is now.
    """

    def __init__(self, is_droppable: Callable[[Item], bool]) -> None:
        self._is_droppable = is_droppable
        self._items: dict[Hashable, Item] = {}
        self._seen: set[Hashable] = set()
        self._kept: set[Hashable] = set()
        self._owner: object = None

    def get(self, key: Hashable, owner: object, make: Callable[[], Item]) -> Item:
        """The item of `key`; others are dropped before it is made."""
        if owner is not self._owner:
            self._owner = owner
            for other in [k for k in self._items if k not in self._kept]:
                if self._is_droppable(self._items[other]):
                    del self._items[other]
        if key not in self._items:
            (self._kept if key in self._seen else self._seen).add(key)
            self._items[key] = make()
        return self._items[key]

    def undroppable(self) -> dict[Hashable, Item]:
        """What could not be made again as it is now."""
        return {k: item for k, item in self._items.items() if not self._is_droppable(item)}

    def pop(self, key: Hashable) -> None:
        """Drop an item for good."""
        self._items.pop(key, None)
        self._seen.discard(key)
        self._kept.discard(key)

    def clear(self) -> None:
        """Drop everything."""
        self._items.clear()
        self._seen.clear()
        self._kept.clear()


class Saved:
    """A tensor that backward needs, and how often it had been written to."""

    def __init__(self, tensor: Tensor, whose: str = "") -> None:
        self._tensor = tensor.detach()  # without the graph, which holds this
        self._version = version(tensor)
        self._whose = whose

    def get(self) -> Tensor:
        """The tensor, unless it was written to."""
        tensor, now = self._tensor, version(self._tensor)
        if now == self._version:
            return tensor
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: {self._whose}[{tensor.type()} {list(tensor.shape)}] is at version"
            f" {now}; expected version {self._version} instead. Call backward before the"
            " optimizer's step, and before anything else writes to it"
        )


class Made:
    """How a value was made, so that it can be made again."""

    def __init__(self, name: str, owner: object, compute: Map, sources: Sequence[Tensor]) -> None:
        self.owner = owner
        self.compute = compute
        self.needs = [tensor.requires_grad for tensor in sources]
        self._saved = [Saved(tensor, f"raw or state of {name!r}, ") for tensor in sources]

    def sources(self) -> list[Tensor]:
        """Raw and state, with which a graph begins."""
        saved = zip(self._saved, self.needs, strict=True)
        return [own.get().detach().requires_grad_(need) for own, need in saved]


class Again(NamedTuple):
    """A value that was made again, and what its own graph begins with."""

    value: Tensor
    sources: list[Tensor]


class View(NamedTuple):
    """What the graph keeps in place of a value, or of a view of one."""

    made: Made
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Recomputed:
    """The values of one call, which its graph does not keep.

    The network runs inside of `looking_through()`: what its operations save for backward is looked
    through, and a value, or a view of one, is replaced by how to make it.
    """

    def __init__(self) -> None:
        self._again: Recent[Again] = Recent(lambda _: True)
        self._lock = RLock()  # in backward each device has a thread of its own
        self._known: dict[int, tuple[Any, Made, tuple[Any, ...]]] = {}

    def make(self, name: str, owner: object, compute: Map, sources: Sequence[Tensor]) -> Tensor:
        """Compute a value of which backward needs nothing but raw and state."""
        value = compute(sources)
        if not _is_new(value, sources):
            return value
        made = Made(name, owner, compute, sources)
        if value.requires_grad:
            value = cast("Tensor", _Value.apply(self, made, [value.detach()], *sources))
        storage = value.untyped_storage()
        self._known[id(storage)] = weakref.ref(storage), made, _layout(value)
        return value

    def again(self, made: Made) -> Again:
        """Make a value again, or return the one that was made while it is kept."""
        sources = made.sources()
        if not any(made.needs):  # no end will come for it
            return Again(made.compute(sources), sources)
        with self._lock:
            return self._again.get(made, made.owner, lambda: Again(made.compute(sources), sources))

    def end_of(self, made: Made) -> tuple[GradientEdge, list[Tensor]]:
        """The same for the last time: where its graph ends and begins, without the value."""
        again = self.again(made)
        with self._lock:
            self._again.pop(made)
        return get_gradient_edge(again.value), again.sources

    @contextmanager
    def looking_through(self) -> Generator[None]:
        """A block in which no operation saves a value."""
        around = _hooks_around(True)  # of a checkpoint around the network, for one
        save, load = (Saved, Saved.get) if around is None else around

        def pack(tensor: Tensor) -> Any:
            made = self._made(tensor)
            if made is None:
                return save(tensor)
            return View(made, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

        def unpack(kept: Any) -> Tensor:
            if not isinstance(kept, View):
                return load(kept)
            value = self.again(kept.made).value.detach()
            return value.as_strided(kept.size, kept.stride, kept.offset)

        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            self._known.clear()

    def _made(self, tensor: Tensor) -> Made | None:
        """How the value was made that `tensor` is, or is a view of; None if it is none."""
        if not _is_plain(tensor):
            return None
        storage = tensor.untyped_storage()
        known, made, layout = self._known.get(id(storage), (None, None, None))
        if known is None or known() is not storage or _layout(tensor) != layout:
            return None  # another tensor, or one that was written to
        return made


class _Value(torch.autograd.Function):
    """The place of a map in the graph; it keeps nothing but raw and state."""

    @staticmethod
    def forward(
        ctx: Any, values: Recomputed, made: Made, value: list[Tensor], *sources: Tensor
    ) -> Tensor:
        ctx.values, ctx.made = values, made
        ctx.save_for_backward(*sources)
        return value.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        made, sources = ctx.made, ctx.saved_tensors
        if torch.is_grad_enabled():  # this is differentiated itself
            edge = get_gradient_edge(made.compute(sources))
        else:
            edge, sources = ctx.values.end_of(made)
        wanted = [x for x, need in zip(sources, made.needs, strict=True) if need]
        again = torch.is_grad_enabled()
        found = iter(
            torch.autograd.grad([edge], wanted, grads, create_graph=again, allow_unused=True)
        )
        return None, None, None, *(next(found) if need else None for need in made.needs)


def _is_new(value: Tensor, sources: Sequence[Tensor]) -> bool:
    """Whether the value has memory of its own, by which it is recognised."""
    if not all(map(_is_plain, (value, *sources))):
        return False
    storage = value.untyped_storage()
    return all(source.untyped_storage() is not storage for source in sources)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def version(tensor: Tensor) -> int:
    """How often the tensor was written to; inference tensors do not count."""
    if tensor.is_inference():
        return -1
    return tensor._version  # pyright: ignore[reportPrivateUsage]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """What a view of a value as it was made has in common with it."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg(), version(tensor)
