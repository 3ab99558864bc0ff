"""The one boundary: what a transform takes and gives for one value, found out on meta tensors.

Behind it transforms are bare mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from funcparam.transforms.contract.base import AnyTransform, State


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe `tensor`."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def admits(self, tensor: Tensor) -> bool:
        """Whether the shape is equal and the dtype is, up to precision.

        Casting a whole network to another precision is ordinary; real to complex is not. Some
        casts, and averages, take booleans along: any number may stand for one.
        """
        same = self.dtype == torch.bool or _kind(tensor.dtype) == _kind(self.dtype)
        return tuple(tensor.shape) == self.shape and same

    def meta(self) -> Tensor:
        """Make a meta tensor of this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else str(dtype)


NamedSpecs = tuple[tuple[str, TensorSpec], ...]


@dataclass(frozen=True)
class Signature:
    """The specs of a value and of the raw and state that stand for it."""

    value: TensorSpec
    raw: TensorSpec | NamedSpecs
    state: NamedSpecs


def signature(transform: AnyTransform | None, spec: TensorSpec) -> Signature:
    """Run `transform` on a meta tensor; None passes the value through as raw.

    Raises:
        ValueError: the transform cannot serve such a value, or returns one of another shape or
            dtype; nothing was computed.
        TypeError: it returns something else than tensors.
    """
    if transform is None:
        return Signature(spec, spec, ())
    expect_static(transform)
    transform.check(spec.meta())
    raw: Any
    state: State
    try:
        raw, state = _pair(transform, transform.right_inverse(spec.meta()))
    except NotImplementedError:  # no right inverse: raw is like the value
        raw, state = spec.meta(), {}
    except RuntimeError as error:
        raise ValueError(_no_meta(transform, "right_inverse", error)) from error
    found = Signature(spec, _raw_spec(transform, raw), _named_specs(transform, "state", state))
    try:
        out: Any = transform.forward(raw, state)
    except RuntimeError as error:
        raise ValueError(_no_meta(transform, "forward", error)) from error
    if not isinstance(out, Tensor):
        raise TypeError(f"{transform!r} expects forward to return a tensor; got {describe(out)}")
    if TensorSpec.of(out) != spec:
        raise ValueError(
            f"{transform!r} changes the weight: expected {spec}, as the right inverse was given;"
            f" got {TensorSpec.of(out)} from forward"
        )
    return found


def expect_static(transform: AnyTransform) -> None:
    """Raise TypeError unless the transform is hashable."""
    try:
        hash(transform)
    except TypeError as error:
        raise TypeError(
            f"{transform!r} expects to be hashable: make it a dataclass with frozen=True, without"
            " lists, dicts or tensors in it; tensors belong in state"
        ) from error


def expect_dense(transform: AnyTransform, value: Tensor) -> None:
    """Raise ValueError for sparse tensors."""
    if value.layout is not torch.strided:
        raise ValueError(
            f"{transform!r} expects a dense tensor; got {value.layout}. Give it value.to_dense(),"
            " or leave it out of the rules"
        )


def _pair(transform: AnyTransform, returned: Any) -> tuple[Any, Any]:
    pair = cast("tuple[Any, ...]", returned) if isinstance(returned, tuple) else ()
    if len(pair) != 2:
        raise TypeError(
            f"{transform!r} expects right_inverse to return (raw, state);"
            f" got {describe(cast('object', returned))}"
        )
    return pair


def _no_meta(transform: AnyTransform, what: str, error: RuntimeError) -> str:
    return (
        f"{transform!r} expects {what} to run on meta tensors, which have shapes but no entries;"
        f" got {error}"
    )


def _raw_spec(transform: AnyTransform, raw: Any) -> TensorSpec | NamedSpecs:
    if isinstance(raw, Tensor):
        return TensorSpec.of(raw)
    return _named_specs(transform, "raw", raw)


def _named_specs(transform: AnyTransform, what: str, tensors: Any) -> NamedSpecs:
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{transform!r} expects right_inverse to return {what} as"
            f" {'a tensor or ' if what == 'raw' else ''}a dict of tensors; got {describe(tensors)}"
        )
    items = cast("Mapping[Any, Any]", tensors).items()
    for key, tensor in items:
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"{transform!r} expects {what} to map names to tensors;"
                f" got {key!r}: {describe(tensor)}"
            )
    return tuple((key, TensorSpec.of(tensor)) for key, tensor in items)


def check_raw(spec: TensorSpec | NamedSpecs, raw: Any, where: str) -> None:
    """Raise unless `raw`, which stands at `where`, is what `spec` says.

    Raises:
        TypeError: it is not a tensor where one is due, or the other way round.
        ValueError: its names, shapes or dtypes differ.
    """
    if isinstance(spec, TensorSpec):
        _check_tensor(spec, raw, where)
        return
    if isinstance(raw, Tensor):
        names = ", ".join(repr(name) for name, _ in spec)
        raise TypeError(
            f"{where}: expected a dict with {names or 'no tensors'}; got a tensor of shape"
            f" {tuple(raw.shape)}. If it is a value, p.init or p.right_inverse makes it raw"
        )
    check_named(spec, raw, where)


def check_named(spec: NamedSpecs, tensors: Any, where: str) -> None:
    """Raise unless `tensors` has exactly the names, shapes and dtypes of `spec`."""
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{where}: expected a dict of tensors; got {describe(tensors)}")
    given = cast("Mapping[str, Any]", tensors)
    expected = dict(spec)
    if given.keys() != expected.keys():
        raise ValueError(f"{where}: expected the names {list(expected)}; got {list(given)}")
    for name, tensor in given.items():
        _check_tensor(expected[name], tensor, f"{where}[{name!r}]")


def _check_tensor(spec: TensorSpec, tensor: Any, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a tensor, {spec}; got {describe(tensor)}")
    if not spec.admits(tensor):
        stacked = tuple(tensor.shape[1:]) == spec.shape
        hint = ". If the first dimension is a stack, use torch.func.vmap" if stacked else ""
        raise ValueError(f"{where}: expected {spec}; got {TensorSpec.of(tensor)}{hint}")


def describe(thing: object) -> str:
    """Say what `thing` is, in an error."""
    if isinstance(thing, Mapping):
        names = list(cast("Mapping[Any, Any]", thing))
        return f"a dict with {names[:4]}{' and more' if len(names) > 4 else ''}"
    return f"{type(thing).__module__}.{type(thing).__qualname__}".removeprefix("builtins.")
