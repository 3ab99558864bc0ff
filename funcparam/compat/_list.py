from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from funcparam.compat import _private
from funcparam.compat._adapter import as_module
from funcparam.compat._tensors import all_or_nothing, own_tensors, put, register


class ParametrizationList(nn.ModuleList):
    """The parametrizations of one tensor, first to last, and the raw tensors they start from.

    Raw is `original`; where the right inverse gives several tensors, `original0`, `original1`, …

    Args:
        modules: the parametrizations; at least one.
        original: the parameter or buffer that is parametrized. It stays the same object if raw is
            one tensor, or if it is itself one of several.
        unsafe: whether the value may differ from `original` in dtype and shape.

    Raises:
        ValueError: the parametrizations do not fit the tensor.
    """

    if TYPE_CHECKING:  # TorchScript takes annotations at face value
        original: Tensor
        unsafe: bool
        is_tensor: bool
        moved: bool  # whether raw is anything but the tensor as it was
        ntensors: int
        raw_names: tuple[str, ...]
        shared: bool  # whether the list of another module has the same raw tensors
        before: str  # which of several raw tensors was there before; empty if none was

    def __init__(
        self,
        modules: Sequence[nn.Module],
        original: Tensor,
        unsafe: bool = False,  # noqa: FBT001
    ) -> None:
        if len(modules) == 0:
            raise ValueError("ParametrizationList requires one or more modules.")
        super().__init__([as_module(module) for module in modules])
        # past nn.Module.__setattr__, which takes most of the time of a registration
        vars(self).update(unsafe=unsafe, before="", shared=False)
        shape, dtype = original.shape, original.dtype
        raw = self._raw_for(original)
        is_tensor = isinstance(raw, Tensor)
        moved = raw is not original
        names = ("original",) if is_tensor else tuple(f"original{i}" for i in range(len(raw)))
        vars(self).update(is_tensor=is_tensor, moved=moved, ntensors=len(names), raw_names=names)
        if isinstance(raw, Tensor):
            self._hold_one(original, raw)
        else:
            self._hold_many(original, raw)
        if not unsafe:
            _check_registration(self(), shape, dtype)

    def _raw_for(self, value: Tensor) -> Tensor | Sequence[Any]:
        """The right inverse of `value`, where a missing one is taken for the identity."""
        raw: Any = value
        with torch.no_grad():
            for part in reversed(self._parts()):
                if hasattr(part, "right_inverse"):
                    try:
                        raw = cast("Any", part).right_inverse(raw)
                    except NotImplementedError:
                        continue
        if not isinstance(raw, (Tensor, Sequence)):
            raise ValueError(
                "'right_inverse' must return a Tensor or a Sequence of tensors (list, tuple...). "
                f"Got {type(raw).__name__}"
            )
        return cast("Tensor | Sequence[Any]", raw)

    def _hold_one(self, original: Tensor, raw: Tensor) -> None:
        for what in ("dtype", "device"):
            if getattr(original, what) != getattr(raw, what):
                raise ValueError(
                    f"When `right_inverse` outputs one tensor, it may not change the {what}.\n"
                    f"original.{what}: {getattr(original, what)}\n"
                    f"right_inverse(original).{what}: {getattr(raw, what)}"
                )
        with torch.no_grad():
            put(original, raw)
        register(self, "original", original)

    def _hold_many(self, original: Tensor, raw: Sequence[Any]) -> None:
        for i, element in enumerate(raw):
            name = f"original{i}"
            if isinstance(element, Tensor):
                register(self, name, like(original, element))
                if element is original:
                    self.before = name
            elif _private.is_opaque_reference(element):
                setattr(self, name, element)
            else:
                kind = "Tensor or a Sequence of tensors (list, tuple...)"
                if _private.is_opaque(element):
                    kind = "Tensor or a reference-type opaque"
                raise ValueError(
                    f"'right_inverse' must return a {kind}. "
                    f"Got element {i} of the sequence with type {type(element).__name__}."
                )

    def right_inverse(self, value: Tensor) -> None:
        """Set the raw tensors to the right inverse of `value`, last parametrization first.

        Raises:
            RuntimeError: a parametrization has no `right_inverse`.
            ValueError: what it returns does not fit the raw tensors.
        """
        raw: Any = value
        with torch.no_grad(), all_or_nothing(self.modules(), own_tensors(self)):
            for part in reversed(self._parts()):
                if not hasattr(part, "right_inverse"):
                    raise RuntimeError(
                        f"parametrization {type(part).__name__} does not implement right_inverse."
                    )
                raw = cast("Any", part).right_inverse(raw)
            if self.is_tensor:
                self._set_one(raw)
            else:
                self._set_many(raw)

    def _set_one(self, raw: Any) -> None:
        if not isinstance(raw, Tensor):
            raise ValueError(f"`right_inverse` should return a tensor. Got {type(raw).__name__}")
        if raw.dtype != self.original.dtype:
            raise ValueError(
                f"The tensor returned by `right_inverse` has dtype {raw.dtype} "
                f"while `original` has dtype {self.original.dtype}"
            )
        put(self.original, raw)

    def _set_many(self, raw: Any) -> None:
        if not isinstance(raw, Sequence):
            raise ValueError(
                f"'right_inverse' must return a sequence of tensors. Got {type(raw).__name__}."
            )
        elements = cast("Sequence[Any]", raw)
        if len(elements) != self.ntensors:
            raise ValueError(
                "'right_inverse' must return a sequence of tensors of length "
                f"{self.ntensors}. Got a sequence of length {len(elements)}."
            )
        for i, element in enumerate(elements):
            self._check_element(i, element)
        for i, element in enumerate(elements):
            if isinstance(element, Tensor):
                put(getattr(self, f"original{i}"), element)
            else:
                setattr(self, f"original{i}", element)

    def _check_element(self, i: int, element: Any) -> None:
        if _private.is_opaque_reference(element):
            return
        if not isinstance(element, Tensor):
            raise ValueError(
                "'right_inverse' must return a sequence of tensors or reference-type opaques. "
                f"Got element {i} of type {type(element).__name__}."
            )
        dtype = getattr(self, f"original{i}").dtype
        if dtype != element.dtype:
            raise ValueError(
                f"Tensor {i} returned by `right_inverse` has dtype {element.dtype} "
                f"while `original{i}` has dtype {dtype}"
            )

    @_private.unscripted
    def forward(self) -> Tensor:
        """Compute the value from the raw tensors."""
        parts, i = self._modules, 1  # nn.Module.__getattr__ and ModuleList's are slow
        value = parts["0"](*self.raw())
        while (part := parts.get(str(i))) is not None:
            value, i = part(value), i + 1
        return value

    def raw(self) -> tuple[Any, ...]:
        """The raw tensors in order."""
        found = self._parameters
        return tuple([found[n] if n in found else getattr(self, n) for n in self.raw_names])

    def _parts(self) -> list[nn.Module]:
        return [part for key, part in self._modules.items() if key.isdigit()]


def like(original: Tensor, element: Tensor) -> Tensor:
    """`element` as a parameter if `original` is one; an optimizer that knows it keeps it."""
    if element is original:
        return original
    if isinstance(original, nn.Parameter):
        return nn.Parameter(element, original.requires_grad)
    return element.requires_grad_(original.requires_grad)


def _check_registration(value: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"A parametrization must return a tensor. Got {type(value).__name__}.")
    for what, expected in (("dtype", dtype), ("shape", shape)):
        if getattr(value, what) != expected:
            raise ValueError(
                f"Registering a parametrization may not change the {what} of the tensor, unless"
                " `unsafe` flag is enabled.\n"
                f"unparametrized {what}: {expected}\n"
                f"parametrized {what}: {getattr(value, what)}"
            )
