"""What happens when a parametrized attribute is read or assigned to."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock, get_ident
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from funcparam.compat import _cache, _private

# What a module carries for the time of a call only; a copy made meanwhile does without.
PASSING = ("_funcparam_exchanged", "_funcparam_resetting")
_EXCHANGED, _RESETTING = PASSING


class _Exchange(NamedTuple):
    """A value that a call of `functional_call` put in."""

    call: FrameType
    thread: int
    value: Tensor


_LOCK = Lock()  # around changes of the exchanges of any module


def read(module: nn.Module, name: str) -> Tensor:
    """The value of a parametrized tensor."""
    own = module.__dict__
    resetting = None
    if _EXCHANGED in own:
        exchanged = _exchanged(own, name)
        if exchanged is not None:
            return exchanged
    if _RESETTING in own:
        resetting = own[_RESETTING]
        if name in resetting:
            return resetting[name][0]
    value = _cache.evaluate(own["_modules"]["parametrizations"]._modules[name])
    if resetting is not None:
        resetting[name] = value, _private.version(value)
    return value


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Set raw to the right inverse of `value`; what `functional_call` assigns is used as it is."""
    if torch.compiler.is_compiling():
        _assign_uncompiled(module, name, value)
        return
    call = _private.exchange(depth=2)
    if call is None:
        cast("Any", _list(module, name)).right_inverse(value)
    else:
        _exchange(module, name, call, value)


@_private.not_compiled(
    "a parametrized tensor is assigned to. If this is torch.func.functional_call, pass the"
    " raw tensors instead, 'parametrizations.weight.original' in place of 'weight'"
)
def _assign_uncompiled(module: nn.Module, name: str, value: Tensor) -> None:
    if _private.is_traced_exchange():
        raise RuntimeError(
            f"torch.func.functional_call puts a value in the place of the parametrized '{name}'"
            " inside a compiled function, where funcparam.compat cannot use it as it is. Pass the"
            f" raw tensors instead, under 'parametrizations.{name}.original'"
        )
    cast("Any", _list(module, name)).right_inverse(value)


def _exchange(module: nn.Module, name: str, call: FrameType, value: Tensor) -> None:
    """Put `value` in the place of the computed one, or take out what `call` put in before."""
    with _LOCK:
        exchanges: dict[str, list[_Exchange]] = module.__dict__.get(_EXCHANGED, {})
        before = exchanges.get(name, [])
        others = [item for item in before if item.call is not call]
        if len(others) == len(before):
            others.append(_Exchange(call, get_ident(), value))
        exchanges = {**exchanges, name: others}
        if any(exchanges.values()):
            module.__dict__[_EXCHANGED] = exchanges
        else:
            del module.__dict__[_EXCHANGED]


def _exchanged(own: dict[str, Any], name: str) -> Tensor | None:
    """What is in the place of the value: of this thread, else of the one that it may work for."""
    found: list[_Exchange] = own.get(_EXCHANGED, {}).get(name, [])
    if len(found) > 1:
        found = [item for item in found if item.thread == get_ident()] or found
    return found[-1].value if found else None


@contextmanager
def writing_back(module: nn.Module) -> Generator[None]:
    """Hand out one value for each name; where it was written to, raw follows at the end."""
    if _RESETTING in module.__dict__:  # reset_parameters that calls the other one
        yield
        return
    values: dict[str, tuple[Tensor, int]] = {}
    module.__dict__[_RESETTING] = values
    try:
        yield
    finally:
        del module.__dict__[_RESETTING]
    for name, (value, version) in values.items():
        if _private.version(value) != version:
            cast("Any", _list(module, name)).right_inverse(value.detach())


def _list(module: nn.Module, name: str) -> nn.Module:
    return module.__dict__["_modules"]["parametrizations"]._modules[name]
