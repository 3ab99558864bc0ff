from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funcparam.compat import _private

_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` a parameter or buffer of `module`, whichever it is."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of the module itself."""
    own = vars(module)  # parameters() and buffers() take ten times as long
    return [x for x in (*own["_parameters"].values(), *own["_buffers"].values()) if x is not None]


def shaped(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, which has to have a shape; `module` calls it `name`."""
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"'{name}' of module '{module}' has no shape yet: run a batch through the lazy module"
            " first, then parametrize it"
        )
    return tensor


def raw_tensors(held: Any) -> tuple[Tensor, ...]:
    """What a `ParametrizationList`, torch's too, computes the value from, in order."""
    if held.is_tensor:
        return (held.original,)
    return tuple(getattr(held, f"original{i}") for i in range(held.ntensors))


def put(dest: Tensor, src: Tensor) -> None:
    """Give `dest` the data of `src` and let it be the same object, which optimizers know."""
    if dest is src:
        return
    wrapper = _private.is_wrapper_subclass(dest)
    if not wrapper and not torch.__future__.get_swap_module_params_on_conversion():
        dest.set_(src)  # pyright: ignore[reportArgumentType]
        return
    # an object of its own: what is swapped loses its data, and `src` may be a part of it
    new = src.detach()
    if isinstance(dest, nn.Parameter):
        new = nn.Parameter(new, requires_grad=dest.requires_grad)
    try:
        torch.utils.swap_tensors(dest, new)
    except RuntimeError:  # a compiler, for one, holds weak references to what it has traced
        if wrapper:
            raise
        dest.set_(src)  # pyright: ignore[reportArgumentType]


def tree(*modules: nn.Module) -> list[nn.Module]:
    """The modules and all below them; `modules()` takes three times as long."""
    found = list(modules)
    for module in found:  # which grows meanwhile
        below = vars(module)["_modules"].values()
        found += [child for child in below if child is not None and child not in found]
    return found


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module], tensors: Iterable[Tensor] = ()) -> Generator[None]:
    """Leave everything as it was if the block fails.

    Args:
        modules: their classes, attributes, tensors and children, and what is in their buffers.
        tensors: what the block may give other data.
    """
    before = [_Snapshot(part) for part in modules]
    held = [(tensor, tensor.detach(), tensor.grad) for tensor in tensors]
    try:
        yield
    except BaseException:
        for snapshot in before:
            snapshot.restore()
        for tensor, alias, grad in held:
            _restore(tensor, alias, grad)
        for snapshot in before:
            snapshot.written.put_back()
        raise


class Values:
    """What is in some tensors now, to be written back into them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back(self) -> None:
        with torch.no_grad():
            for tensor, copy in self._copies:
                tensor.copy_(copy)


@contextmanager
def state_kept(parts: nn.Module) -> Generator[None]:
    """Put the buffers of `parts` back at the end, as they were."""
    before = [(part, dict(vars(part)["_buffers"])) for part in tree(parts)]
    values = Values(parts.buffers())
    yield
    values.put_back()
    for part, own in before:
        vars(part)["_buffers"].update(own)


class _Snapshot:
    """The class and the attributes of one module, its tables copied, and what is in its buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.type = module, type(module)
        self.attributes = own = vars(module).copy()
        self.tables: list[tuple[Any, Any]] = [(own[name], own[name].copy()) for name in _TABLES]
        self.written = Values(x for x in own["_buffers"].values() if x is not None)

    def restore(self) -> None:
        self.module.__class__ = self.type
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for table, copy in self.tables:
            table.clear()
            table.update(copy)


def _restore(tensor: Tensor, alias: Tensor, grad: Tensor | None) -> None:
    with torch.no_grad():
        if _private.is_wrapper_subclass(tensor) or tensor.untyped_storage().data_ptr() != (
            alias.untyped_storage().data_ptr()
        ):
            put(tensor, alias)
    if tensor.grad is not grad:  # swapped away
        tensor.grad = grad
