"""Noticing that someone writes into a computed value, as one may into a plain parameter."""

from __future__ import annotations

from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from funcparam.compat import _private


class Loan:
    """A value that was handed out, watched until it is gone.

    The alias shares the value's version counter but not its graph, and goes when the value goes.
    """

    __slots__ = ("_alias", "_node", "_raw", "_value", "_version", "written")

    def __init__(self, value: Tensor, held: nn.Module) -> None:
        self._raw = _versions(held)
        self._alias: Tensor | None = value.detach()
        self._version = _private.version(value)
        self._node = value.grad_fn
        self.written = False
        self._value: ref[Tensor] | None = ref(value, self._end)

    def _end(self, _: object) -> None:
        self.written = self._alias is not None and self._changed(self._alias)
        if not self.written:  # else what was written is wanted at the next read
            self.close()

    def close(self) -> None:
        """Watch no longer."""
        self._alias = self._node = self._value = None

    def written_value(self) -> Tensor:
        """What the value is after it was written to."""
        return cast("Tensor", self._alias)

    def _changed(self, tensor: Tensor) -> bool:
        return _private.version(tensor) != self._version

    def is_written(self, held: nn.Module) -> bool:
        """Whether the value was written to, in place and behind autograd's back.

        Not if raw was, too: what is in raw now counts, a loaded checkpoint for one.
        """
        if _versions(held) != self._raw:
            return False
        value = self._value and self._value()
        if value is None:
            return self.written
        if not self._changed(value) or value.grad_fn is not self._node:
            return False
        return not _is_held(value, held)  # a view of raw is written to rightly

    def __deepcopy__(self, memo: Any) -> None:
        return None


def lend(value: Tensor, held: nn.Module) -> Loan | None:
    """Watch `value`, unless it is raw itself or belongs to a transform or a trace."""
    if value.__class__ is not Tensor or value.is_meta or torch.is_inference_mode_enabled():
        return None
    if torch.__future__.get_swap_module_params_on_conversion():
        return None  # what is watched cannot be swapped
    if not _private.is_plain(value):
        return None
    if value.grad_fn is None and _is_held(value, held):
        return None
    return Loan(value, held)


def _versions(held: nn.Module) -> tuple[int, ...]:
    return tuple(map(_private.version, vars(held)["_parameters"].values()))


def _is_held(value: Tensor, held: nn.Module) -> bool:
    storage = value.untyped_storage().data_ptr()
    return any(
        not _private.is_plain(tensor) or tensor.untyped_storage().data_ptr() == storage
        for tensor in (*held.parameters(), *held.buffers())
    )


def write_back(module: nn.Module, name: str, held: nn.Module, value: Tensor) -> None:
    """Let raw be the right inverse of what was written into a computed value.

    `torch.nn.init` and other code for plain parameters writes in place; with torch's module that
    has no effect, and no error says so.

    Raises:
        RuntimeError: there is no right inverse, so the write cannot have an effect.
    """
    try:
        cast("Any", held).right_inverse(value)
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(
            f"the value of the parametrized '{name}' of {type(module).__name__} was written to in"
            " place. That cannot change it, since it is computed from raw tensors for which its"
            " parametrization has no right_inverse. Write to"
            f" module.parametrizations.{name}.original; for a change that is meant to be local,"
            " write to a clone"
        ) from error
