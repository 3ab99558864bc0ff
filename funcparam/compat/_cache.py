from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import local
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from funcparam.compat import _gate, _private
from funcparam.compat._tensors import own_tensors, tree


class _Entry(NamedTuple):
    """A value and what it was computed from, which is held so that no id is given anew."""

    trace: str | None
    sources: list[object]
    conditions: tuple[object, ...]
    value: Tensor


class _Scope(local):
    """The open block of each thread.

    Thread-local because `torch.compile` cannot trace a `ContextVar`.
    """

    def __init__(self) -> None:
        self.entries: dict[int, _Entry] | None = None


_SCOPE = _Scope()


@contextmanager
def cached() -> Generator[None]:
    """Compute each parametrized tensor once inside the block, while nothing it depends on changes.

    The block belongs to the thread that entered it. A value is computed anew when one of
    the raw tensors, parameters or buffers it comes from is another one or was written to, and
    when the grad mode, autocast, training mode or `torch.func` transform differs. A compiled
    function shares no values with what is outside of it. In a nested block the outer one's values
    are used. Everything is dropped at the end of the outermost block.

    Raises:
        RuntimeError: a parametrized tensor is read while `torch.jit.trace` runs.

    Example:
        >>> from torch import nn
        >>> from funcparam.compat import parametrizations, parametrize
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 2))
        >>> with parametrize.cached():
        ...     layer.weight is layer.weight
        True
    """
    if _SCOPE.entries is not None:
        yield
        return
    _SCOPE.entries = {}
    try:
        yield
    finally:
        _SCOPE.entries = None


def evaluate(parametrization: nn.Module) -> Tensor:
    """The value of a `ParametrizationList`: from the cache where one is open and has it."""
    entries = _gate.entries() if _SCOPE.entries is None else _SCOPE.entries
    if entries is None:
        return cast("Tensor", parametrization())
    if _private.is_jit_tracing():
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    entry = entries.get(id(parametrization))
    if entry is not None and _is_current(entry, parametrization):
        return entry.value
    value = cast("Tensor", parametrization())
    new = _Entry(_trace(), _sources(parametrization), _conditions(parametrization), value)
    if torch.compiler.is_compiling():
        # An entry of an earlier run stays: writing over it would recompile at every run.
        if entry is None:
            entries[id(parametrization)] = new
    elif _may_keep(new):
        entries[id(parametrization)] = new
    return value


def _is_current(entry: _Entry, parametrization: nn.Module) -> bool:
    if entry.trace != _trace() or entry.conditions != _conditions(parametrization):
        return False
    sources = _sources(parametrization)
    if len(sources) != len(entry.sources):
        return False
    return all(new is old for new, old in zip(sources, entry.sources, strict=True))


def _trace() -> str | None:
    """What an entry belongs to: a trace, or None for what runs eagerly.

    A compiler cannot read whether a tensor was written to. In one trace it need not, and
    with another one nothing is shared.
    """
    return _private.trace() if torch.compiler.is_compiling() else None


def _sources(module: nn.Module) -> list[object]:
    """The module and every tensor in it."""
    return [module, *_tensors(module)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [x for part in tree(module) for x in own_tensors(part)]


def _conditions(parametrization: nn.Module) -> tuple[object, ...]:
    """Everything but identity that must not differ."""
    modes = (torch.is_grad_enabled(), parametrization.training)
    if torch.compiler.is_compiling():
        return modes
    tensors = _tensors(parametrization)
    autocast = [_private.autocast_dtype(device) for device in {x.device.type for x in tensors}]
    versions = map(_private.version, tensors)
    return (*modes, torch.is_inference_mode_enabled(), *autocast, *versions)


def _may_keep(entry: _Entry) -> bool:
    """Not if the value belongs to a `torch.func` transform that none of the sources shows."""
    wrapped = (torch.func.debug_unwrap(x) is not x for x in entry.sources if isinstance(x, Tensor))
    return torch.func.debug_unwrap(entry.value) is entry.value or any(wrapped)
