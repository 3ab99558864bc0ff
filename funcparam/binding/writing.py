"""What is written to a value in the network of a shell goes to raw, as after `reset_parameters`."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from funcparam.binding.binding import Binding
from funcparam.binding.dotted import changed, overwrite
from funcparam.binding.shell import Shell
from funcparam.binding.slots import refuse_write
from funcparam.binding.watch import is_bound_around
from funcparam.parametrization.boundary import value_of
from funcparam.parametrization.sharding import whole
from funcparam.parametrization.values import inverted


@contextmanager
def to_raw(shell: Shell, binding: Binding | None) -> Generator[None]:
    """A block that notices writes to what is bound; in a compiled one nothing is."""
    if binding is None:
        yield
        return
    binding.watch_writes()
    yield
    if written := binding.last_written():
        if is_bound_around(binding.places.net):
            raise RuntimeError(
                f"{min(written)!r} was written to in a block inside of another one, which has its"
                " old value: write to it before, or in the outer block"
            )
        _write(shell, written)


def _write(shell: Shell, values: Mapping[str, Any]) -> None:
    """Set raw and state to the right inverse of some values, all of them or none."""
    p = shell.parametrization
    entries = {entry.name: entry for entry in p.entries}
    with torch.no_grad():
        given: dict[str, Tensor] = {}
        for name, value in values.items():
            if not isinstance(value, Tensor):
                refuse_write(name)
            given[name] = value_of(entries[name], {name: value})
        old_raw, old_state = shell.raw_and_state()
        raw, state = inverted({name: p[name] for name in given}, given, None, finite=True)
        every_raw, every_state = whole({**old_raw, **raw}), whole({**old_state, **state})
        settled = p._plan.settled(every_raw, every_state, given)  # pyright: ignore
        state = {name: settled[name] for name in given if name in old_state}
        for old, new in ((old_raw, raw), (old_state, state)):
            overwrite(*changed(old, new))
