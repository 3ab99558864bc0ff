from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from funcparam.binding.modes import graph_task
from funcparam.compat import _private
from funcparam.parametrization.sharding import whole
from funcparam.transforms import AnyTransform, Transform
from funcparam.transforms.contract.steps import updated


class TransformModule(nn.Module):
    """A transform in the shape that `register_parametrization` wants: an `nn.Module`.

    Its buffers are the transform's state. Named raw tensors become `original0`, `original1`, …
    in the transform's order. In training mode each call takes one step of what evolves, but none
    in backward, where a checkpoint computes again what forward has computed.

    Args:
        transform: the transform.
    """

    if TYPE_CHECKING:  # TorchScript takes annotations at face value
        transform: AnyTransform
        raw_names: tuple[str, ...] | None
        _evolves: bool
        _buffer_of: dict[str, str]

    def __init__(self, transform: AnyTransform) -> None:
        super().__init__()
        # past nn.Module.__setattr__, which takes most of the time of a registration
        vars(self).update(
            transform=transform,
            raw_names=None,
            _evolves=type(transform).update is not Transform.update,
            _buffer_of={},
        )

    @_private.unscripted
    def forward(self, *raw: Tensor) -> Tensor:
        """Map raw to the value, after one step of what evolves if in training mode."""
        named, state = self.named(whole(raw)), self.state()
        if self._evolves:
            state = self._advanced(named, state)
        return self.transform.forward(named, state)

    def _advanced(self, raw: Any, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        if not steps(self):
            # backward keeps what the value came from, and the next step writes to the buffers
            return {key: tensor.clone() for key, tensor in state.items()}
        new = updated(self.transform, raw, state)
        for key, buffer in state.items():
            write(buffer, new[key])
        return new

    def right_inverse(self, value: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Find raw for `value`; the state that belongs to it goes into the buffers."""
        raw, state = self.transform.right_inverse(value.detach())
        self.take(raw, state)
        return raw if isinstance(raw, Tensor) else tuple(raw.values())

    def follow(self, value: Tensor) -> None:
        """Come after other parts, whose value is the raw of this one; take the state for it."""
        self.transform.check(value)
        try:
            raw, state = self.transform.right_inverse(torch.empty_like(value, device="meta"))
        except NotImplementedError:
            return
        if not isinstance(raw, Tensor):
            self.raw_names = tuple(raw)
        elif state:
            self.right_inverse(value)

    def state(self) -> dict[str, Tensor]:
        """The transform's state, from the buffers."""
        buffers = self._buffers
        return {key: cast("Tensor", buffers[name]) for key, name in self._buffer_of.items()}

    def take(self, raw: Any, state: Mapping[str, Tensor]) -> None:
        """Let the buffers be `state`, and know the names of raw."""
        for key, tensor in state.items():
            name = self._buffer_of.setdefault(key, key.replace(".", "_"))
            self.register_buffer(name, tensor)
        names = None if isinstance(raw, Tensor) else tuple(raw)
        if names != self.raw_names:
            self.raw_names = names

    def named(self, raw: tuple[Tensor, ...]) -> Any:
        """Raw as the transform takes it."""
        if self.raw_names is None:
            return raw[0]
        return dict(zip(self.raw_names, raw, strict=True))

    def extra_repr(self) -> str:
        return repr(self.transform)


def steps(part: nn.Module) -> bool:
    """Whether what evolves in `part` takes a step when it is called now.

    What backward runs is a checkpoint that computes again, in all likelihood.
    """
    return part.training and (torch.compiler.is_compiling() or graph_task() == -1)


def write(buffer: Tensor, new: Tensor) -> None:
    """Write new state into a buffer, in place: replicas and checkpoints share it.

    Under `vmap` or `grad` over raw alone the new state belongs to the transform and has no
    place in a buffer outside of it; it served this call and is dropped.
    """
    if new is not buffer and not (_private.is_transforming() and _escapes(new, buffer)):
        buffer.copy_(new)


class FunctionModule(nn.Module):
    """A plain callable as a parametrization; its own `right_inverse` is used where it has one."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    @_private.unscripted
    def forward(self, *raw: Tensor) -> Tensor:
        """Call the function."""
        return self.function(*raw)

    def right_inverse(self, value: Tensor) -> Any:
        """Call the function's own right inverse."""
        inverse = getattr(self.function, "right_inverse", None)
        if inverse is None:
            raise NotImplementedError(
                f"the function {_name(self.function)} has no right_inverse, so nothing can be"
                " assigned to what it parametrizes; fp.transform(forward, right_inverse) adds one"
            )
        return inverse(value)

    def extra_repr(self) -> str:
        return _name(self.function)


def as_module(parametrization: object) -> nn.Module:
    """Make an `nn.Module` of a parametrization of any kind.

    Raises:
        TypeError: it is neither a module nor a transform nor callable.
    """
    if isinstance(parametrization, nn.Module):
        return parametrization
    if isinstance(parametrization, Transform):
        return TransformModule(cast("AnyTransform", parametrization))
    if callable(parametrization) and not isinstance(parametrization, type):
        return FunctionModule(cast("Callable[..., Tensor]", parametrization))
    hint = "; call it first" if isinstance(parametrization, type) else ""
    raise TypeError(
        "a parametrization is expected to be an nn.Module, a funcparam transform or a function;"
        f" got {parametrization!r}{hint}"
    )


def _escapes(new: Tensor, buffer: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return torch.func.debug_unwrap(new) is not new and torch.func.debug_unwrap(buffer) is buffer


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", function))
