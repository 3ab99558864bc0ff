from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from funcparam.transforms import State, Transform

Specs = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@final
@dataclass(frozen=True, eq=False)
class Legacy(Transform[Mapping[str, Tensor]]):
    """A chain of `nn.Module` parametrizations as one pure transform.

    Raw is `{"original": ...}` (or `original0`, …) together with the modules' own parameters under
    `"i.name"`, where i is the module's position; state holds their buffers likewise. `forward`
    runs the modules in evaluation mode, and `update` runs those that were in training mode in
    it, on copies of the buffers, and returns what they became. It compares by identity.

    Made by [`to_functional`][funcparam.compat.to_functional]; the modules in it are empty shells.
    """

    parts: tuple[nn.Module, ...]
    value: tuple[tuple[int, ...], torch.dtype]
    raw: Specs
    state: Specs

    def __repr__(self) -> str:
        return f"Legacy({', '.join(type(part).__name__ for part in self.parts)})"

    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        if next(iter(raw.values())).is_meta:  # modules of others need not run on meta tensors
            return _empty(*self.value)
        return self._run(raw, {name: tensor.clone() for name, tensor in state.items()}, train=False)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        if value.is_meta:
            return _metas(self.raw), _metas(self.state)
        raise NotImplementedError(
            f"{self!r} was made from modules, which hold raw and state of their own:"
            " to_functional returns them"
        )

    def update(self, raw: Mapping[str, Tensor], state: State) -> State:
        new = {name: tensor.clone() for name, tensor in state.items()}
        with torch.no_grad():
            self._run(raw, new, train=True)
        return new

    def violation(self, value: Tensor, state: State) -> Tensor:
        """NaN: the constraint of a module is not known."""
        return torch.full((), torch.nan, device=value.device)

    def check(self, value: Tensor) -> None:
        """Whatever the modules take."""

    def _run(self, raw: Mapping[str, Tensor], buffers: dict[str, Tensor], *, train: bool) -> Tensor:
        x: Any = tuple(tensor for name, tensor in raw.items() if "." not in name)
        for i, part in enumerate(self.parts):
            own = {**_below(i, raw), **_below(i, buffers)}
            part = _in_mode(part, train=train and part.training)
            x = functional_call(part, own, x if isinstance(x, tuple) else (x,))
            for name in _below(i, buffers):  # a module may have put another tensor there
                buffers[f"{i}.{name}"] = own[name]
        return cast("Tensor", x)


def _in_mode(part: nn.Module, *, train: bool) -> nn.Module:
    """`part`, or a copy of the empty shell in the other mode; modes are not switched in place."""
    return part if part.training == train else deepcopy(part).train(train)


def _below(i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{i}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _metas(specs: Specs) -> dict[str, Tensor]:
    return {name: _empty(shape, dtype) for name, shape, dtype in specs}
