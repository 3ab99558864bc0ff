"""From values back: the tensors of a network by their first names, raw and state of them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from funcparam.parametrization.boundary import (
    Entry,
    RawTree,
    StateTree,
    distance_moved,
    expect_finite,
    expect_finite_result,
    value_of,
)
from funcparam.parametrization.names import closest
from funcparam.parametrization.tree import flatten
from funcparam.transforms.contract.base import AnyTransform, Raw, State
from funcparam.transforms.contract.precision import autocast_off, widened
from funcparam.transforms.numerics.linalg import LinAlgError

_LOGGER = logging.getLogger("funcparam")


def by_first_name(entries: Sequence[Entry], values: Any) -> dict[str, Tensor]:
    """The tensors that a parametrization was made for, under their first names."""
    leaves = flatten(values)[0]
    given = {name: leaf.tensor for leaf in leaves for name in leaf.names}
    known = {name: None for entry in entries for name in entry.names}
    for leaf in leaves:  # a module's buffers may stay out of p; its parameters may not
        if not leaf.is_buffer and not any(name in known for name in leaf.names):
            name = leaf.names[0]
            raise ValueError(
                f"unknown name {name!r}: p was made without it; {closest(name, [*known])}"
            )
    return {entry.name: value_of(entry, given) for entry in entries}


def inverted(
    transforms: Mapping[str, AnyTransform],
    values: Mapping[str, Tensor],
    generator: torch.Generator | None,
    *,
    finite: bool,
) -> tuple[dict[str, Raw], dict[str, State]]:
    """Raw and state of values, the latter without what transforms take of others."""
    raw: dict[str, Raw] = dict(values)
    state: dict[str, State] = {}
    for name, transform in transforms.items():
        value = values[name]
        if finite:
            expect_finite(name, value)
        try:
            raw[name], own = transform.right_inverse(value, generator=generator)
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"{name!r}: {error}") from error
        if finite:
            expect_finite_result(name, transform, value, raw[name], own)
        if own:
            state[name] = own
    return raw, state


def violations(
    transforms: Mapping[str, AnyTransform], values: Mapping[str, Tensor], state: StateTree
) -> dict[str, Tensor]:
    """How far each value is from its constraint."""
    found: dict[str, Tensor] = {}
    for name, transform in transforms.items():
        value, own = values[name], state.get(name, {})
        try:
            with autocast_off(value):
                found[name] = transform.violation(*widened((value, own)))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    return found


def log_determinant(
    transforms: Mapping[str, AnyTransform], raw: RawTree, state: StateTree
) -> Tensor:
    """The sum of log |det d value / d raw|."""
    total: Any = torch.zeros(())
    for name, transform in transforms.items():
        try:
            own = transform.log_abs_det_jacobian(raw[name], state.get(name, {}))
        except NotImplementedError as error:
            raise NotImplementedError(f"{name!r}: {error}") from error
        total = total + own
    return total


def projected(
    transforms: Mapping[str, AnyTransform], values: Mapping[str, Tensor], state: StateTree | None
) -> dict[str, Tensor]:
    """The values that have a transform, on their constraints."""
    found: dict[str, Tensor] = {}
    for name, transform in transforms.items():
        with naming(name, transform):
            found[name] = transform.project(values[name], (state or {}).get(name, {}))
    return found


def tangents(
    transforms: Mapping[str, AnyTransform],
    values: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor],
    state: StateTree | None,
) -> dict[str, Tensor]:
    """The parts of vectors along the constraints of values that have a transform."""
    found: dict[str, Tensor] = {}
    for name, transform in transforms.items():
        with naming(name, transform):
            own = (state or {}).get(name, {})
            found[name] = transform.tangent(values[name], vectors[name], own)
    return found


def moves_are_logged() -> bool:
    """Whether anybody wants to know what a projection moved."""
    return not torch.compiler.is_compiling() and _LOGGER.isEnabledFor(logging.INFO)


def log_moves(
    transforms: Mapping[str, AnyTransform],
    values: Mapping[str, Tensor],
    projected: Mapping[str, Tensor],
) -> None:
    """Log which values were projected, and by how much."""
    for name, transform in transforms.items():
        if by := distance_moved(values[name], projected[name]):
            _LOGGER.info("%r was projected by up to %.2g, to %r", name, by, transform)


def said_moves(
    transforms: Mapping[str, AnyTransform], by: Mapping[str, float], prefix: str = ""
) -> str:
    """Which values were projected, in words; the prefix is what they are in."""
    listed = [
        f"{prefix + name!r} by up to {far:.2g}, to {transforms[name]!r}" for name, far in by.items()
    ]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return f"{'; '.join(listed[:4])}{more}"


@contextmanager
def naming(name: str, transform: AnyTransform) -> Generator[None]:
    """Begin the errors of a transform with the name of its weight."""
    try:
        yield
    except (NotImplementedError, ValueError, LinAlgError) as error:
        raise type(error)(f"{name!r}: {error}") from error
    except KeyError as error:
        raise ValueError(
            f"{name!r}: {transform!r} expects state with {error}, which is its constraint; give the"
            " state that p.init returned"
        ) from error


def fresh(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A detached copy."""

    def copy(node: Any) -> Any:
        if not isinstance(node, Tensor):
            return fresh(node)
        return torch.empty_like(node).copy_(node.detach())

    return {name: copy(node) for name, node in tree.items()}
