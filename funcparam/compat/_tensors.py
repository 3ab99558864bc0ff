from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funcparam.compat import _private


def register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` a parameter or buffer of `module`, whichever it is."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


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


@contextmanager
def all_or_nothing(module: nn.Module, *tensors: Tensor) -> Generator[None]:
    """Leave the module as it was if the block fails: class, hooks, tables and `tensors`.

    Everything that lies under `module.parametrizations` belongs to it.
    """
    before = [(part, _Snapshot(part)) for part in _parts(module)]
    evolving = [t for part, _ in before if getattr(part, "evolves", False) for t in part.buffers()]
    copies = [(buffer, buffer.clone()) for buffer in evolving]
    aliases = [(tensor, tensor.detach()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for part, snapshot in before:
            snapshot.restore(part)
        for tensor, alias in aliases:
            _restore(tensor, alias)
        with torch.no_grad():
            for buffer, copy in copies:
                buffer.copy_(copy)
        raise


@contextmanager
def state_kept(parts: nn.Module) -> Generator[None]:
    """Put the buffers of `parts` back at the end, as they were."""
    before = [(part, dict(vars(part)["_buffers"])) for part in parts.modules()]
    copies = [(x, x.clone()) for _, own in before for x in own.values() if x is not None]
    yield
    with torch.no_grad():
        for buffer, copy in copies:
            buffer.copy_(copy)
    for part, own in before:
        vars(part)["_buffers"].update(own)


class _Snapshot:
    """The class and the attributes of one module, its tables copied."""

    def __init__(self, module: nn.Module) -> None:
        self.type = type(module)
        self.attributes = vars(module).copy()
        # most tables are empty, and need no copy
        self.tables: list[tuple[Any, Any]] = [
            (table, table.copy() if table else ())
            for table in self.attributes.values()
            if isinstance(table, (dict, set))
        ]

    def restore(self, module: nn.Module) -> None:
        module.__class__ = self.type
        vars(module).clear()
        vars(module).update(self.attributes)
        for table, copy in self.tables:
            table.clear()
            table.update(copy)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    parametrizations = vars(module)["_modules"].get("parametrizations")
    if parametrizations is not None:
        yield from parametrizations.modules()


def _restore(tensor: Tensor, alias: Tensor) -> None:
    with torch.no_grad():
        if _private.is_wrapper_subclass(tensor) or tensor.untyped_storage().data_ptr() != (
            alias.untyped_storage().data_ptr()
        ):
            put(tensor, alias)
