from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import local
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from funcparam.compat import _private


class _Entry(NamedTuple):
    """A value and what it was computed from, which is held so that no id is given anew."""

    sources: tuple[object, ...]
    conditions: tuple[object, ...]
    value: Tensor


class _Scope(local):
    """The open block of each thread; what a compiler traces is kept apart from what ran.

    Thread-local because `torch.compile` cannot trace a `ContextVar`.
    """

    def __init__(self) -> None:
        self.eager: dict[int, _Entry] | None = None
        self.traced: dict[int, _Entry] | None = None


_SCOPE = _Scope()


@contextmanager
def cached() -> Generator[None]:
    """Compute each parametrized tensor once inside the block, while nothing it depends on changes.

    The block belongs to the thread that entered it. A value is computed anew when one of
    the raw tensors, parameters or buffers it comes from is another one or was written to, and
    when the grad mode, training mode or `torch.func` transform differs. In a nested block the
    outer one's values are used. Everything is dropped at the end of the outermost block.

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
    name = "traced" if torch.compiler.is_compiling() else "eager"
    if getattr(_SCOPE, name) is not None:
        yield
        return
    setattr(_SCOPE, name, {})
    try:
        yield
    finally:
        setattr(_SCOPE, name, None)


def evaluate(parametrization: nn.Module) -> Tensor:
    """The value of a `ParametrizationList`: from the cache where one is open and has it."""
    entries = _SCOPE.traced if torch.compiler.is_compiling() else _SCOPE.eager
    if entries is None:
        return cast("Tensor", parametrization())
    if _private.is_jit_tracing():
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    entry = entries.get(id(parametrization))
    if entry is not None and _is_current(entry, parametrization):
        return entry.value
    value = cast("Tensor", parametrization())
    entry = _Entry(_sources(parametrization), _conditions(parametrization), value)
    if torch.compiler.is_compiling() or _may_keep(entry):
        entries[id(parametrization)] = entry
    return value


def _is_current(entry: _Entry, parametrization: nn.Module) -> bool:
    sources = _sources(parametrization)
    if len(sources) != len(entry.sources):
        return False
    if any(new is not old for new, old in zip(sources, entry.sources, strict=True)):
        return False
    return entry.conditions == _conditions(parametrization)


def _sources(parametrization: nn.Module) -> tuple[object, ...]:
    return (parametrization, *parametrization.parameters(), *parametrization.buffers())


def _conditions(parametrization: nn.Module) -> tuple[object, ...]:
    """Everything but identity that must not differ. In a trace nothing is written in between."""
    modes = (torch.is_grad_enabled(), parametrization.training)
    if torch.compiler.is_compiling():
        return modes
    tensors = (*parametrization.parameters(), *parametrization.buffers())
    return (*modes, torch.is_inference_mode_enabled(), *map(_private.version, tensors))


def _may_keep(entry: _Entry) -> bool:
    """Not if the value belongs to a `torch.func` transform that none of the sources shows."""
    wrapped = (torch.func.debug_unwrap(x) is not x for x in entry.sources if isinstance(x, Tensor))
    return torch.func.debug_unwrap(entry.value) is entry.value or any(wrapped)
