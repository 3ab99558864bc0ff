from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from funcparam.transforms._parts import kept_by, settled_parts, taken_by
from funcparam.transforms.contract.base import AnyTransform, State, Transform, expect_constraint
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role

Part: TypeAlias = "tuple[AnyTransform, State]"


@final
@dataclass(frozen=True, init=False)
class Chain(Transform[Any]):
    """The composition of transforms, first to last: `Chain(a, b)` maps raw to `b(a(raw))`.

    Raw is the first transform's. Every later one takes the tensor before it as its raw, so only
    the first can have named raw tensors. State holds the states of all under their position:
    `"1.base"` is the base point of the second. The right inverse runs backwards.

    `rebase` moves the first transform's base point. The constraint that `violation` measures is
    that of the last transform that has one, on the value without what comes after it: of
    `Chain(Orthogonal(), Affine(0.5))` that of `Orthogonal` on twice the value. What the ones before
    it exclude is not measured: of `Chain(Symmetric(), Positive())` every positive value has
    violation 0. A right inverse finds one of many raws, and would blame values that the chain
    itself returns, as those of `Chain(UnitNorm(), SpectralNorm())`.

    The log-determinants add up over the free coordinates: `Positive` after `Symmetric` counts the
    upper triangle. A chain has one if at most one of its transforms does more than move entries or
    map each by itself, or if all entries are free on both sides of those that do.

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

    def refresh(self, raw: Any, state: State) -> State:
        new = dict(state)
        last = max((int(key.partition(".")[0]) for key in state), default=-1)
        for i, (part, own) in enumerate(self._each(state)):
            if i > last:
                break
            own = part.refresh(raw, own)
            new |= {f"{i}.{key}": tensor for key, tensor in own.items()}
            if i < last:
                raw = part.forward(raw, own)
        return new

    def rebase(self, raw: Any, state: State) -> tuple[Any, State]:
        first, own = next(self._each(state))
        raw, own = first.rebase(raw, own)
        return raw, {**state, **{f"0.{key}": tensor for key, tensor in own.items()}}

    def project(self, value: Tensor, state: State) -> Tensor:
        expect_constraint(self.parts[0])
        return super().project(value, state)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        expect_constraint(self.parts[0])
        return super().tangent(value, vector, state)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        for part, own in reversed(list(self._flat(state))):
            raw = part.undo(value, own)
            if raw is None:
                return part.violation(value, own)
            value = raw
        return value.real.new_zeros(())

    def log_abs_det_jacobian(self, raw: Any, state: State) -> Tensor:
        parts, inputs = list(self._flat(state)), [raw]
        for part, own in parts:
            inputs.append(part.forward(inputs[-1], own))
        total = inputs[-1].real.new_zeros(())
        for (part, own), x in zip(parts, inputs, strict=False):
            if _mixes(part):
                total = total + part.log_abs_det_jacobian(x, own)
        masks = self._free_in_each(parts, inputs)
        for (part, own), x, free in zip(parts, inputs, masks, strict=False):
            if part.is_entrywise:
                total = total + _log_derivatives(part, x, own, free).sum()
        return total

    def free_in_raw(self, raw: Any, state: State) -> Tensor | None:
        parts = list(self._flat(state))
        for i, (part, own) in enumerate(parts):
            if _mixes(part):
                return _before(parts[:i], part.free_in_raw(raw, own))[0]
            raw = part.forward(raw, own)
        return None

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        parts = list(self._flat(state))
        for i, (part, own) in reversed(list(enumerate(parts))):
            if _mixes(part):
                return _behind(parts[i + 1 :], part.free_in_value(value, own))[-1]
            value, _ = part.right_inverse(value) if part.moves_entries else (value, own)
        return None

    def kept_weight(self, state: State) -> Tensor | None:
        return kept_by(self.parts, state)

    def takes(self) -> Mapping[str, str]:
        return taken_by(self.parts)

    def settled(self, state: State) -> State:
        return settled_parts(self.parts, state)

    def adapts(self, key: str) -> bool:
        return self.parts[0].adapts(key)

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

    def _each(self, state: State) -> Iterator[Part]:
        for i, part in enumerate(self.parts):
            prefix = f"{i}."
            own = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
            yield part, own

    def _flat(self, state: State) -> Iterator[Part]:
        """The parts, with those of chains among them in their place."""
        for part, own in self._each(state):
            if isinstance(part, Chain):
                yield from part._flat(own)
            else:
                yield part, own

    def _free_in_each(self, parts: list[Part], inputs: list[Any]) -> list[Tensor | None]:
        """Which entries of what each part takes are free; only the entrywise ones need to know."""
        mixing = [i for i, (part, _) in enumerate(parts) if _mixes(part)]
        free: list[Tensor | None] = [None] * len(parts)
        if not mixing:
            return free
        first, last = mixing[0], mixing[-1]
        for one, two in pairwise(mixing):
            masks = [
                parts[one][0].free_in_value(inputs[one + 1], parts[one][1]),
                parts[two][0].free_in_raw(inputs[two], parts[two][1]),
            ]
            if any(mask is not None for mask in masks):
                raise NotImplementedError(
                    f"{self!r} has no log_abs_det_jacobian: not every entry of what"
                    f" {parts[one][0]!r} returns and {parts[two][0]!r} takes is free, and which are"
                    " so in both is not known"
                )
        if first:
            part, own = parts[first]
            free[:first] = _before(parts[:first], part.free_in_raw(inputs[first], own))
        if last + 1 < len(parts):
            part, own = parts[last]
            behind = _behind(parts[last + 1 :], part.free_in_value(inputs[last + 1], own))
            free[last + 1 :] = behind[:-1]
        return free


def _mixes(part: AnyTransform) -> bool:
    """Whether an entry of the value may depend on several of raw, or some of raw are not used."""
    return not (part.moves_entries or part.is_entrywise)


def _before(parts: list[Part], free: Tensor | None) -> list[Tensor | None]:
    """The mask of free entries in front of each part, given the one behind all."""
    masks = [free]
    for part, _ in reversed(parts):
        if free is not None and part.moves_entries:
            free, _ = part.right_inverse(free)
        masks.insert(0, free)
    return masks[:-1] or masks


def _behind(parts: list[Part], free: Tensor | None) -> list[Tensor | None]:
    """The mask of free entries in front of each part and behind the last, given the first one."""
    masks = [free]
    for part, own in parts:
        if free is not None and part.moves_entries:
            free = part.forward(free, own)
        masks.append(free)
    return masks


def _log_derivatives(part: AnyTransform, x: Tensor, own: State, free: Tensor | None) -> Tensor:
    if free is None:
        return part.log_derivative(x, own)
    # an entry that does not count may be where the derivative is 0, and its logarithm infinite
    return torch.where(free, part.log_derivative(torch.where(free, x, 1), own), 0)
