"""What happens when a parametrized attribute is read or assigned to."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from funcparam.compat import _cache, _private

# What a module carries for the time of a call only; a copy made meanwhile does without.
PASSING = ("_funcparam_exchanged", "_funcparam_resetting")
_EXCHANGED, _RESETTING = PASSING


class _Exchange(NamedTuple):
    """A value that `functional_call` put in, and what it will bring back in the end."""

    before: object
    value: Tensor


def read(module: nn.Module, name: str) -> Tensor:
    """The value of a parametrized tensor."""
    if _private.is_scripting():
        raise RuntimeError("Parametrization is not working with scripting.")
    own = module.__dict__
    resetting = None
    if _EXCHANGED in own and own[_EXCHANGED].get(name):
        return own[_EXCHANGED][name][-1].value
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
    if _private.is_scripting():
        raise RuntimeError("Parametrization is not working with scripting.")
    if torch.compiler.is_compiling():
        _assign_uncompiled(module, name, value)
        return
    before = _private.value_in_exchange(depth=2)
    if before is None:
        cast("Any", _list(module, name)).right_inverse(value)
    else:
        _exchange(module, name, before, value)


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


def _exchange(module: nn.Module, name: str, before: object, value: Tensor) -> None:
    """Put `value` in the place of the computed one, or take it out if `value` was there before."""
    stack: list[_Exchange] = module.__dict__.setdefault(_EXCHANGED, {}).setdefault(name, [])
    if stack and stack[-1].before is value:
        stack.pop()
        if not any(module.__dict__[_EXCHANGED].values()):
            del module.__dict__[_EXCHANGED]
    else:
        stack.append(_Exchange(before, value))


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
