from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.utils.parametrizations
import torch.nn.utils.parametrize
from torch.nn import init

from funcparam.compat import _initial, hooks, parametrizations, parametrize
from funcparam.compat._readings import READINGS

_HOOKS = (hooks.WeightNormHook, hooks.SpectralNormHook)
_ORIGINALS = types.SimpleNamespace(depth=0, pairs=())


def install() -> None:
    """Let torch's own `parametrize`, `parametrizations` and older hooks be funcparam's.

    The names in torch's modules, and wherever torch has imported them, are redirected.
    Modules that torch parametrized before go on working. Calls nest: as many
    [`uninstall`][funcparam.compat.uninstall] undo them.

    Warns:
        UserWarning: a module outside of torch has imported a function by its name already, and so
            keeps torch's; the text names such modules.

    Example:
        >>> import torch
        >>> from funcparam.compat import installed, parametrizations
        >>> with installed():
        ...     torch.nn.utils.parametrizations.orthogonal is parametrizations.orthogonal
        True
    """
    if _ORIGINALS.depth == 0:
        pairs = tuple(_pairs())
        _warn_of_earlier_imports(pairs)  # first, since a warning may be an error
        _ORIGINALS.pairs = pairs
        for name, old, new in pairs:
            _replace(name, old, new)
        for hook in _HOOKS:
            setattr(hook, "__setstate__", hooks.mended)  # noqa: B010
        READINGS.wanted = True
    _ORIGINALS.depth += 1


def uninstall() -> None:
    """Undo one [`install`][funcparam.compat.install]; after the last, torch is as it was.

    Raises:
        RuntimeError: it is not installed.
    """
    if _ORIGINALS.depth == 0:
        raise RuntimeError("funcparam.compat is not installed, so it cannot be uninstalled")
    _ORIGINALS.depth -= 1
    if _ORIGINALS.depth == 0:
        for name, old, new in _ORIGINALS.pairs:
            _replace(name, new, old)
        for hook in _HOOKS:
            delattr(hook, "__setstate__")
        _ORIGINALS.pairs = ()
        READINGS.wanted = False


@contextmanager
def installed() -> Generator[None]:
    """Install for the time of a `with` block."""
    install()
    try:
        yield
    finally:
        uninstall()


def _pairs() -> Iterator[tuple[str, Any, Any]]:
    """Name, torch's object and ours, of all that the modules offer, and of the kinds of parts."""
    for kind in (
        parametrizations.OrthogonalModule,
        parametrizations.SpectralNormModule,
        parametrizations.WeightNormModule,
    ):
        name = kind.__name__
        yield name, getattr(torch.nn.utils.parametrizations, name), kind
    yield from _initial.functions()
    for theirs, ours in (
        (torch.nn.utils.parametrize, parametrize),
        (torch.nn.utils.parametrizations, parametrizations),
        (torch.nn.utils, hooks),
    ):
        for name in ours.__all__:
            yield name, getattr(theirs, name), getattr(ours, name)


def _replace(name: str, old: Any, new: Any) -> None:
    """Redirect `name` in all loaded modules of torch that have it as `old`."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "torch" and getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _warn_of_earlier_imports(pairs: tuple[tuple[str, Any, Any], ...]) -> None:
    """Name the modules that took a function of torch's before, which no redirection reaches."""
    # of torch.nn.init nobody expects more than torch's, and many have imported from it
    names = {id(old): name for name, old, _ in pairs if old.__module__ != init.__name__}
    found: list[str] = []
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] in ("torch", "funcparam"):
            continue
        own = list(getattr(module, "__dict__", {}).values())
        if taken := sorted({names[id(item)] for item in own if id(item) in names}):
            found.append(f"{path} ({', '.join(taken)})")
    if found:
        warnings.warn(
            "funcparam.compat is installed too late for what was imported by its name before, and"
            f" stays torch's: {'; '.join(sorted(found))}. Install before these modules are"
            " imported, for example by `python -m funcparam.compat script.py`",
            stacklevel=3,
        )
