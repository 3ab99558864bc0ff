"""`torch.func.functional_call`, prepared once for a module."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import getitem, is_, itemgetter, setitem
from threading import RLock
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from typing_extensions import Never

Place = tuple[dict[str, Any], str]
"""The table of a submodule, and the key in it, under which a tensor is kept."""

_values = cast("Any", dict.values)
_get = cast("Any", dict.get)
_tables: Any = itemgetter("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Swap:
    """Where the tensors of one list of names go: to a place each, then to those tied to it."""

    names: list[str]
    tables: list[dict[str, Any]]
    keys: list[str]
    sources: list[int]
    """Which of the names each further place has its tensor from."""

    def take(self) -> list[Any]:
        """Read from the tables."""
        return list(map(getitem, self.tables, self.keys))

    def put(self, tensors: list[Any]) -> None:
        """Write into the tables."""
        deque(map(setitem, self.tables, self.keys, tensors), maxlen=0)

    def written(self, tensors: list[Any]) -> Iterator[tuple[str, Any]]:
        """The names with another tensor in their first place than was put there."""
        found: list[Any] = list(map(_get, self.tables, self.keys))
        if all(map(is_, found, tensors)):
            return
        for i, name in enumerate(self.names):
            if found[i] is not tensors[i] and self.keys[i] in self.tables[i]:
                yield name, found[i]


@final
class FunctionalCall:
    """A module that is called with given tensors in place of its own.

    Made by [`functional_call`][funcparam.functional_call].
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._lock = RLock()
        self._prepare()

    def __call__(
        self,
        params: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        strict: bool = False,
    ) -> Any:
        """Call the module with `params`, and leave it as it was.

        Args:
            params: tensors by name, or several dicts of them without common names. One name of a
                tie serves all. What the module writes over, running statistics for one, is
                replaced in the dict.
            args: positional arguments; anything but a tuple is the only one.
            kwargs: keyword arguments.
            strict: whether `params` has to have exactly the module's names.

        Raises:
            ValueError: names of one tie are given different tensors, or two dicts have a name
                in common.
            RuntimeError: names are missing or unknown with `strict`.
            AttributeError, TypeError: a name leads nowhere, or to no tensor.
        """
        positional = cast("tuple[Any, ...]", args) if isinstance(args, tuple) else (args,)
        if strict or not isinstance(params, dict):
            return self._by_torch(params, positional, kwargs, strict=strict)
        if torch.compiler.is_compiling():
            # Looking for ties is half of what it takes to trace a call.
            ties = len(self._aliases) > 0 or params.keys() != self._place.keys()
            return self._by_torch(params, positional, kwargs, tie_weights=ties)
        with self._lock:  # other threads wait; the same one may call again
            if not self._is_as_prepared():
                self._prepare()
            swap = self._swap_of(params)
            if swap is None:
                return self._by_torch(params, positional, kwargs)
            tensors = [*params.values()]
            tensors += [tensors[i] for i in swap.sources]
            try:
                before = swap.take()
            except KeyError:  # a tensor has another name by now
                self._prepare()
                return self(params, args, kwargs)
            try:
                swap.put(tensors)
                return self.net(*positional, **(kwargs or {}))
            finally:
                params.update(swap.written(tensors))
                swap.put(before)

    def __reduce__(self) -> Any:
        return FunctionalCall, (self.net,)

    def _by_torch(self, params: Any, args: Any, kwargs: Any, **how: bool) -> Any:
        """Whatever is not proven to be the same is left to PyTorch."""
        own = None if kwargs is None else dict(kwargs)
        return torch.func.functional_call(self.net, params, args, own, **how)

    def _swap_of(self, params: dict[str, Tensor]) -> Swap | None:
        """Where these tensors go; None if PyTorch has to say what to do with them."""
        if not all(issubclass(kind, Tensor) for kind in set(map(type, params.values()))):
            return None
        names = list(params)
        if self._last is None or self._last.names != names:
            self._last = self._new_swap(names)
        return self._last

    def _new_swap(self, names: list[str]) -> Swap | None:
        if not self._place.keys() >= set(names):
            return None
        places = [self._place[name] for name in names]
        if len({(id(table), key) for table, key in places}) < len(places):
            return None  # several names of one tie
        further = [
            (i, place) for i, name in enumerate(names) for place in self._aliases.get(name, ())
        ]
        places += [place for _, place in further]
        tables, keys = [table for table, _ in places], [key for _, key in places]
        return Swap(names, tables, keys, [i for i, _ in further])

    def _prepare(self) -> None:
        """Look up where every tensor of the tree is kept."""
        named = cast(
            "Iterator[tuple[str, nn.Module]]", self.net.named_modules(remove_duplicate=False)
        )
        tree = list(named)
        if not all(isinstance(t, dict) for _, module in tree for t in _tables(vars(module))):
            tree = []  # a part is scripted, and nothing is proven of it
        modules: dict[int, dict[str, Any]] = {}
        holder: dict[str, int] = {}
        kept: dict[int, list[Place]] = {}
        for path, module in tree:
            for table in _tables(vars(module))[:2]:
                for key, tensor in table.items():
                    if tensor is None:
                        continue
                    holder[f"{path}.{key}" if path else key] = id(tensor)
                    if id(module) not in modules:
                        kept.setdefault(id(tensor), []).append((table, key))
            modules[id(module)] = vars(module)
        self._place = {name: kept[tensor][0] for name, tensor in holder.items()}
        shared = len(set(holder.values())) < len(holder)
        tied = holder.items() if shared else ()
        self._aliases = {name: kept[tensor][1:] for name, tensor in tied}
        self._last: Swap | None = None
        self._modules = list(modules.values())
        self._tables, self._entries = self._picture()

    def _is_as_prepared(self) -> bool:
        tables, entries = self._picture()
        return entries == self._entries and all(map(is_, tables, self._tables))

    def _picture(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """All on which the places depend: the tables, what they hold, and under which keys."""
        tables: list[dict[str, Any]] = list(chain.from_iterable(map(_tables, self._modules)))
        filled = list(filter(None, tables))
        entries = cast("Any", chain.from_iterable(map(_values, filled)))
        return tables, [*map(id, entries), *chain.from_iterable(filled)]


def functional_call(net: nn.Module, *torchs: Never) -> FunctionalCall:
    """Prepare `net` to be called with other tensors in place of its own.

    `functional_call(net)(params, args, kwargs)` returns what
    `torch.func.functional_call(net, params, args, kwargs)` returns, at about a tenth of its cost
    for many parameters: ties, buffers that the module replaces, and exceptions are treated alike.
    Nested calls are served; threads that share it take turns. In a compiled function, and where
    names are unknown, a tie is given twice or `strict` is asked for, it is PyTorch's own.

    Args:
        net: the module. It may change afterwards, but its ties not once a compiled function has
            it.
        *torchs: nothing. PyTorch's own takes the parameters and the arguments here.

    Raises:
        TypeError: `net` is no module, or more is given.

    Example:
        >>> import torch, funcparam as fp
        >>> net = torch.nn.Linear(2, 1)
        >>> call = fp.functional_call(net)
        >>> call({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, (torch.ones(3, 2),))
        tensor([[2.],
                [2.],
                [2.]])
    """
    if not isinstance(net, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"functional_call expects a module; got {type(net).__name__}")
    if torchs:
        raise TypeError(
            f"functional_call expects the module alone; got {len(torchs)} more. What it returns is"
            " called with the rest: fp.functional_call(net)(params, args, kwargs)"
        )
    return FunctionalCall(net)
