"""`torch.func.functional_call`, prepared once for a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from threading import RLock
from typing import Any, cast, final

import torch
from torch import Tensor, nn

Place = tuple[dict[str, Any], str]
"""The table of a submodule, and the key in it, under which a tensor is kept."""

_values = cast("Any", dict.values)
_tables: Any = attrgetter("_parameters", "_buffers", "_modules")


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
        if strict or torch.compiler.is_compiling() or not isinstance(params, dict):
            return self._by_torch(params, positional, kwargs, strict=strict)
        with self._lock:  # other threads wait; the same one may call again
            if self._picture() != self._prepared:
                self._prepare()
            places = self._places_of(params)
            if places is None:
                return self._by_torch(params, positional, kwargs, strict=False)
            return self._swapped(params, places, positional, kwargs or {})

    def __reduce__(self) -> Any:
        return FunctionalCall, (self.net,)

    def _by_torch(self, params: Any, args: Any, kwargs: Any, *, strict: bool) -> Any:
        """Whatever is not proven to be the same is left to PyTorch."""
        return torch.func.functional_call(
            self.net, params, args, None if kwargs is None else dict(kwargs), strict=strict
        )

    def _places_of(self, params: dict[str, Tensor]) -> list[Place] | None:
        """The place of each name; None if PyTorch has to say what to do with these names."""
        try:
            places = [self._place[name] for name in params]
        except KeyError:
            return None
        if not all(issubclass(kind, Tensor) for kind in set(map(type, params.values()))):
            return None
        if self._aliases:
            first = {(id(table), key) for table, key in places}
            if len(first) < len(places):
                return None  # several names of one tie
        return places

    def _swapped(
        self,
        params: dict[str, Tensor],
        places: list[Place],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        items = list(params.items())
        before = [table[key] for table, key in places]
        tied = [name for name, _ in items if name in self._aliases] if self._aliases else []
        try:
            for (table, key), (_, value) in zip(places, items, strict=True):
                table[key] = value
            for name in tied:
                _put(self._aliases[name], params[name])
            return self.net(*args, **kwargs)
        finally:
            for (table, key), (name, value), old in zip(places, items, before, strict=True):
                if table.get(key, value) is not value:
                    params[name] = table[key]
                table[key] = old
            for name in tied:
                _put(self._aliases[name], _get(self._place[name]))

    def _prepare(self) -> None:
        """Look up where every tensor of the tree is kept."""
        tree = cast(
            "Iterator[tuple[str, nn.Module]]", self.net.named_modules(remove_duplicate=False)
        )
        modules: dict[int, nn.Module] = {}
        holder: dict[str, int] = {}
        kept: dict[int, list[Place]] = {}
        for path, module in tree:
            for table in _tables(module)[:2]:
                for key, tensor in table.items():
                    if tensor is None:
                        continue
                    holder[f"{path}.{key}" if path else key] = id(tensor)
                    if id(module) not in modules:
                        kept.setdefault(id(tensor), []).append((table, key))
            modules[id(module)] = module
        self._modules = list(modules.values())
        self._place = {name: kept[tensor][0] for name, tensor in holder.items()}
        shared = len(set(holder.values())) < len(holder)
        tied = holder.items() if shared else ()
        self._aliases = {name: kept[tensor][1:] for name, tensor in tied}
        self._prepared = self._picture()

    def _picture(self) -> list[Any]:
        """All on which the places depend: classes, tables, children, and who shares a tensor."""
        tables: list[dict[str, Any]] = list(chain.from_iterable(map(_tables, self._modules)))
        entries = cast("Any", chain.from_iterable(map(_values, filter(None, tables))))
        return [*map(type, self._modules), *map(id, tables), *map(id, entries)]


def _get(place: Place) -> Any:
    table, key = place
    return table[key]


def _put(places: list[Place], tensor: Any) -> None:
    for table, key in places:
        table[key] = tensor


def functional_call(net: nn.Module) -> FunctionalCall:
    """Prepare `net` to be called with other tensors in place of its own.

    `functional_call(net)(params, args, kwargs)` returns what
    `torch.func.functional_call(net, params, args, kwargs)` returns, at a tenth of its cost for
    many parameters: ties, buffers that the module replaces, and exceptions are treated alike.
    Nested calls are served; threads that share it take turns. In a compiled function, and where
    names are unknown, a tie is given twice or `strict` is asked for, it is PyTorch's own.

    Args:
        net: the module. It may change afterwards.

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
    return FunctionalCall(net)
