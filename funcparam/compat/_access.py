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
from funcparam.compat._readings import READINGS
from funcparam.compat._tensors import Values, all_or_nothing, own_tensors, raw_tensors

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
    if _EXCHANGED in own and (exchanged := _exchanged(own, name)) is not None:
        return exchanged
    resetting = own.get(_RESETTING)
    if resetting is not None and name in resetting:
        return resetting[name][0]
    held = own["_modules"]["parametrizations"]._modules[name]
    value = _cache.evaluate(held)
    if resetting is not None:
        resetting[name] = value, _private.version(value)
    elif READINGS.wanted and not torch.compiler.is_compiling():
        READINGS.add(value, module, name, besides=own_tensors(held))
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
    before = Values([*module.parameters(), *module.buffers()])
    values: dict[str, tuple[Tensor, int]] = {}
    module.__dict__[_RESETTING] = values
    try:
        try:
            yield
        finally:
            del module.__dict__[_RESETTING]
        written = {n: x for n, (x, version) in values.items() if _private.version(x) != version}
        initialise(module, written)
    except BaseException:
        before.put_back()
        raise


def initialise(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Set raw to the right inverse of values that were drawn, and what evolves to what fits."""
    lists = {name: _list(module, name) for name in values}
    parts = [part for held in lists.values() for part in held.modules()]
    with all_or_nothing(parts, [x for held in lists.values() for x in own_tensors(held)]):
        for name, held in lists.items():
            cast("Any", held).right_inverse(values[name].detach())
            _restart(held)


def _restart(held: Any) -> None:
    """Let power iterations start from the singular vectors of what they divide now."""
    args: tuple[Any, ...] = raw_tensors(held)
    with torch.no_grad():
        for part in held:
            if hasattr(part, "restart"):
                part.restart(*args)
            args = (part(*args),)


def _list(module: nn.Module, name: str) -> nn.Module:
    return module.__dict__["_modules"]["parametrizations"]._modules[name]
