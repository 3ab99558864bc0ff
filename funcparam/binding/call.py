"""A network that is called with raw and state in place of its own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, final

from torch import Tensor, nn

from funcparam.binding.evaluation import Evaluation
from funcparam.binding.functional_call import FunctionalCall
from funcparam.parametrization.boundary import RawTree, StateTree
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.tree import flatten
from funcparam.transforms.contract.signature import describe


@final
class ParametrizedCall:
    """A module that is called with raw and state in place of its own tensors.

    Made by [`recompute`][funcparam.recompute].
    """

    def __init__(self, net: nn.Module, p: Parametrization[dict[str, Tensor]]) -> None:
        self.net = net
        self.parametrization = p
        parameters = {n for leaf in flatten(net)[0] if not leaf.is_buffer for n in leaf.names}
        self._evaluation = Evaluation(p, parameters, recompute=True)
        self._call = FunctionalCall(net)

    def __call__(
        self,
        raw: RawTree,
        state: StateTree | None = None,
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        buffers: dict[str, Tensor] | None = None,
    ) -> Any:
        """Call the module with the values of raw and state, and leave it as it was.

        Args:
            raw: as for [`Parametrization`][funcparam.Parametrization].
            state: likewise.
            args: positional arguments; anything but a tuple is the only one.
            kwargs: keyword arguments.
            buffers: more tensors by name, in place of the module's own. What the module writes
                over, running statistics for one, is replaced in the dict.

        Raises:
            TypeError, ValueError: as `p(raw, state)`. Nothing was computed.
        """
        buffers = {} if buffers is None else buffers
        values = self._evaluation.values(raw, {} if state is None else state)
        bound = {**buffers, **values.tensors}
        try:
            if values.reading is None:
                return self._call(bound, args, kwargs)
            positional = cast("tuple[Any, ...]", args) if isinstance(args, tuple) else (args,)
            return self._call.call(bound, positional, dict(kwargs or {}), values.reading)
        finally:
            buffers |= {name: bound[name] for name in buffers}

    def __reduce__(self) -> Any:
        return ParametrizedCall, (self.net, self.parametrization)


def recompute(net: nn.Module, p: Parametrization[dict[str, Tensor]]) -> ParametrizedCall:
    """Prepare `net` to be called with values of `p` that are made again when backward needs them.

    `recompute(net, p)(raw, state, args, kwargs)` returns what
    `functional_call(net, p(raw, state), args, kwargs)` returns, and the gradients are the same. In
    between no value is held: each is made when the network reads it, dropped when another module
    reads another one, and made once more in backward, the derivatives of its map at the same time.
    A value that has to be made anew in one call, because modules take turns, is kept until its end.

    Raw and state must not be written to between the call and its backward, which is an error.
    Derivatives of any order by `torch.autograd` work. Values are made at once, and kept, where
    that costs less or nothing else is possible: those below 512 KiB, those that are
    [stacked][funcparam.Parametrization.plan], views of raw, subclasses of tensors, and all of them
    in `torch.func` transforms and forward mode. In a compiled function the compiler is told to
    make them again. Without gradients values are made when they are read, and dropped.

    Under autocast nothing is saved of a linear layer or a convolution, which keeps the cast of its
    weight, and each map is still evaluated once more. A network that itself calls
    `torch.func.grad` or `vjp` in its forward gets PyTorch's error about saved tensor hooks: use
    `functional_call` there.

    Args:
        net: the module. It may change afterwards.
        p: a parametrization of it.

    Raises:
        TypeError: `net` is no module, or `p` no parametrization.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> net = torch.nn.Linear(512, 512)
        >>> p = fp.parametrize(net, {"weight": WeightNorm()})
        >>> raw, state = p.init(net)
        >>> call = fp.recompute(net, p)
        >>> call(raw, state, (torch.ones(2, 512),)).shape
        torch.Size([2, 512])
    """
    if not isinstance(net, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"recompute expects a module; got {describe(net)}")
    if not isinstance(p, Parametrization):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"recompute expects a parametrization; got {describe(p)}")
    return ParametrizedCall(net, p)
