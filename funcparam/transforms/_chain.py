from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import AnyTransform, State, Transform
from funcparam.transforms.contract.roles import Role


@final
@dataclass(frozen=True, init=False)
class Chain(Transform[Any]):
    """The composition of transforms, first to last: `Chain(a, b)` maps raw to `b(a(raw))`.

    Raw is the first transform's. Every later one takes the tensor before it as its raw, so only
    the first can have named raw tensors. State holds the states of all under their position:
    `"1.base"` is the base point of the second. The right inverse runs backwards.

    `rebase` moves the first transform's base point; the log-determinants add up. The constraint
    that `violation` measures is that of the last transform that does more than move entries: of
    `Chain(Orthogonal(), Reshape(...))` that of `Orthogonal`. What the ones before it exclude is
    not measured: of `Chain(Symmetric(), Positive())` every positive value has violation 0. A right
    inverse finds one of many raws, and would blame values that the chain itself returns, as those
    of `Chain(UnitNorm(), SpectralNorm())`.

    Args:
        *parts: at least one transform.

    Raises:
        ValueError: there are no parts.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Chain, Positive, Symmetric
        >>> transform = Chain(Symmetric(), Positive())
        >>> raw, state = transform.right_inverse(torch.ones(2, 2))
        >>> transform.forward(raw, state)
        tensor([[1., 1.],
                [1., 1.]])
    """

    parts: tuple[AnyTransform, ...]

    def __init__(self, *parts: AnyTransform) -> None:
        if not parts:
            raise ValueError("Chain expects at least one transform; got none")
        for part in parts:
            if not isinstance(part, Transform):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"Chain expects transforms; got {part!r}. Chain(a, b) takes them one by one"
                )
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.parts))})"

    def role(self, key: str) -> Role:
        role = self.parts[0].role(key)
        for part in self.parts[1:]:
            role = part.role("") if role == "weight" else role
        return role

    def forward(self, raw: Any, state: State) -> Tensor:
        for part, own in self._each(state):
            raw = part.forward(raw, own)
        return raw

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Any, State]:
        state: dict[str, Tensor] = {}
        raw: Any = value
        for i, part in reversed(list(enumerate(self.parts))):
            if not isinstance(raw, Tensor):
                raise ValueError(
                    f"{self!r}: only the first transform of a chain can have named raw tensors;"
                    f" got {self.parts[i + 1]!r} at position {i + 1}"
                )
            raw, own = part.right_inverse(raw, generator=generator)
            state |= {f"{i}.{key}": tensor for key, tensor in own.items()}
        return raw, state

    def update(self, raw: Any, state: State) -> State:
        evolving = [i for i, part in enumerate(self.parts) if type(part).update != Transform.update]
        new = dict(state)
        for i, (part, own) in enumerate(self._each(state)):
            if i > max(evolving, default=-1):  # no map is evaluated for nothing
                break
            own = part.update(raw, own)
            new |= {f"{i}.{key}": tensor for key, tensor in own.items()}
            if i < max(evolving):
                raw = part.forward(raw, own)
        return new

    def rebase(self, raw: Any, state: State) -> tuple[Any, State]:
        first, own = next(self._each(state))
        raw, own = first.rebase(raw, own)
        return raw, {**state, **{f"0.{key}": tensor for key, tensor in own.items()}}

    def violation(self, value: Tensor, state: State) -> Tensor:
        for part, own in reversed(list(self._each(state))):
            if not part.moves_entries:
                return part.violation(value, own)
            value, _ = part.right_inverse(value)
        return value.real.new_zeros(())

    def log_abs_det_jacobian(self, raw: Any, state: State) -> Tensor:
        total: Any = 0
        for part, own in self._each(state):
            total = total + part.log_abs_det_jacobian(raw, own)
            raw = part.forward(raw, own)
        return total

    def check(self, value: Tensor) -> None:
        # each part is asked about what it is to return, whose shape the ones after it may change
        for i, part in reversed(list(enumerate(self.parts))):
            part.check(value)
            if i == 0:
                return
            try:
                raw, _ = part.right_inverse(torch.empty_like(value, device="meta"))
            except NotImplementedError:  # no right inverse: raw is like the value
                continue
            if isinstance(raw, Tensor):  # else right_inverse says what is wrong
                value = raw

    def _each(self, state: State) -> Iterator[tuple[AnyTransform, State]]:
        for i, part in enumerate(self.parts):
            prefix = f"{i}."
            own = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
            yield part, own
