from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from funcparam.transforms.contract.base import AnyTransform, State, Transform
from funcparam.transforms.contract.roles import Role


class Parts(Transform[Mapping[str, Tensor]]):
    """What transforms of several parts share: raw and state hold those of the parts by position.

    `"0"` is the raw of the first part if that is one tensor, `"0.magnitude"` a named tensor of it.
    """

    parts: tuple[AnyTransform, ...]

    def update(self, raw: Mapping[str, Tensor], state: State) -> State:
        return merged([part.update(X, own) for part, X, own in self.each(raw, state)])

    def refresh(self, raw: Mapping[str, Tensor], state: State) -> State:
        return merged([part.refresh(X, own) for part, X, own in self.each(raw, state)])

    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        pairs = [part.rebase(X, own) for part, X, own in self.each(raw, state)]
        return merged([raw for raw, _ in pairs]), merged([state for _, state in pairs])

    def role(self, key: str) -> Role:
        position, _, own = key.partition(".")
        return self.parts[int(position)].role(own)

    def takes(self) -> Mapping[str, str]:
        return taken_by(self.parts)

    def settled(self, state: State) -> State:
        return settled_parts(self.parts, state)

    def adapts(self, key: str) -> bool:
        position, _, own = key.partition(".")
        return self.parts[int(position)].adapts(own)

    def project(self, value: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no projection: no way is known to the nearest value that is made of such"
            " parts. Train its raw"
        )

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no tangent: a value does not tell the parts that it is made of. Train"
            " its raw"
        )

    def each(
        self, raw: Mapping[str, Tensor], state: State
    ) -> Iterator[tuple[AnyTransform, Any, State]]:
        """Each part with its raw and its state."""
        for i, part in enumerate(self.parts):
            yield part, own_raw(raw, str(i)), own_tensors(state, i)


def kept_by(parts: Iterable[AnyTransform], state: State) -> Tensor | None:
    """The weight that is in the state of a part, the first one that has it."""
    found = (part.kept_weight(own_tensors(state, i)) for i, part in enumerate(parts))
    return next((weight for weight in found if weight is not None), None)


def checked_parts(kind: str, parts: Iterable[AnyTransform]) -> tuple[AnyTransform, ...]:
    """Return the parts as a tuple; raise unless they are transforms, and at least one."""
    parts = tuple(parts)
    if not parts:
        raise ValueError(f"{kind} expects at least one transform; got none")
    for part in parts:
        if not isinstance(part, Transform):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{kind} expects transforms; got {part!r}")
    return parts


def taken_by(parts: Iterable[AnyTransform]) -> dict[str, str]:
    """What parts take, under the keys of state that are theirs by position."""
    return {
        f"{i}.{key}": name for i, part in enumerate(parts) for key, name in part.takes().items()
    }


def settled_parts(parts: Iterable[AnyTransform], state: State) -> State:
    """State with that of each part settled."""
    new = dict(state)
    for i, part in enumerate(parts):
        if part.takes():
            own = part.settled(own_tensors(state, i))
            new |= {f"{i}.{key}": tensor for key, tensor in own.items()}
    return new


def own_raw(raw: Mapping[str, Tensor], key: str) -> Any:
    """The raw of the part under a key: one tensor, or its named ones."""
    return raw[key] if key in raw else own_tensors(raw, key)


def own_tensors(tensors: Mapping[str, Tensor], key: int | str) -> dict[str, Tensor]:
    """The named tensors of the part under a key."""
    prefix = f"{key}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def merged(each: Iterable[Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, under their positions."""
    return named({str(i): tree for i, tree in enumerate(each)})


def named(each: Mapping[str, Tensor | Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, under their keys."""
    found: dict[str, Tensor] = {}
    for key, tree in each.items():
        if isinstance(tree, Tensor):
            found[key] = tree
        else:
            found.update({f"{key}.{name}": tensor for name, tensor in tree.items()})
    return found
