"""A network called with the values of its parametrization, in as little memory as that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from threading import RLock
from typing import Any, NamedTuple, TypeAlias, cast, final

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from funcparam.binding.functional_call import FunctionalCall
from funcparam.binding.modes import is_plain_eager
from funcparam.binding.places import Place
from funcparam.binding.reading import Reading, Spans
from funcparam.parametrization.boundary import Entry, RawTree, StateTree
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.tree import flatten
from funcparam.transforms.contract.base import AnyTransform, State
from funcparam.transforms.contract.signature import describe
from funcparam.transforms.contract.steps import updated

_checkpoint = cast("Any", checkpoint.checkpoint)  # pyright: ignore[reportUnknownMemberType]

SMALLEST = 2**19
"""Bytes from which on a value is made when it is read: at 384 x 384 in float32 that costs nothing
measurable, at 256 x 256 up to a third of an evaluation."""


class _Late(NamedTuple):
    """Values that are made when they are read, and the others."""

    reading: Reading
    others: dict[str, Tensor]


Values: TypeAlias = "dict[str, Tensor] | _Late"
"""What a network is called with."""


@final
class ParametrizedCall:
    """A module that is called with raw and state in place of its own tensors.

    Made by [`recompute`][funcparam.recompute].
    """

    def __init__(
        self, net: nn.Module, p: Parametrization[dict[str, Tensor]], *, recompute: bool
    ) -> None:
        self.net = net
        self.parametrization = p
        self._recompute = recompute
        self._lock = RLock()
        self._at_once = FunctionalCall(net)
        self._reader = FunctionalCall(_Reader(net))
        later = _later(net, p)
        rest = tuple(entry for entry in p.entries if entry not in later)
        self._transforms = {e.name: cast("AnyTransform", e.transform) for e in later}
        self._absent = {entry.name: _absent(entry) for entry in later}
        self._rest: Parametrization[dict[str, Tensor]] = Parametrization(rest, None)
        self._saves = _saves(later)
        self._spans = Spans({}, {})

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
        positional = cast("tuple[Any, ...]", args) if isinstance(args, tuple) else (args,)
        bound = {} if buffers is None else buffers
        own: StateTree = {} if state is None else state
        with self.turn():
            return self.apply(self.values(raw, own), positional, kwargs or {}, bound)

    def __reduce__(self) -> Any:
        make = partial(ParametrizedCall, recompute=self._recompute)
        return make, (self.net, self.parametrization)

    def turn(self) -> AbstractContextManager[Any]:
        """A block for which the calls of other threads wait."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def values(self, raw: RawTree, state: StateTree) -> Values:
        """What `apply` takes, of raw and state."""
        if self._is_late():
            others = self._rest(*self._of_the_rest(raw, state))
            return self._when_read(others, raw, state)
        if self._transforms and self._recompute and torch.compiler.is_compiling():
            others = self._rest(*self._of_the_rest(raw, state))
            return self._as_compilers_do(others, raw, state)
        return self.parametrization(raw, state)

    def advanced(self, raw: RawTree, state: StateTree) -> tuple[Values, dict[str, State]]:
        """The same after a step of what evolves, and the new state."""
        late = self._is_late()
        if not (late or (self._recompute and torch.compiler.is_compiling())):
            return self.parametrization.advance(raw, state)
        others, new = self._rest.advance(*self._of_the_rest(raw, state))
        for name, transform in self._transforms.items():
            if name in state:
                new[name] = updated(transform, raw[name], state[name])
        make = self._when_read if late else self._as_compilers_do
        return make(others, raw, new), new

    def apply(
        self,
        values: Values,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        buffers: dict[str, Tensor],
    ) -> Any:
        """Call the module with values and buffers; what it replaces is replaced in `buffers`."""
        if isinstance(values, dict):
            call, prefix = self._at_once, ""
            bound = {**buffers, **values}
        else:
            call, prefix = self._reader, "net."
            tensors = {**buffers, **values.others, **self._absent}
            bound = {f"net.{name}": tensor for name, tensor in tensors.items()}
            args, kwargs = (values.reading, self._absent, args, kwargs), {}
        try:
            return call(bound, args, kwargs)
        finally:
            buffers |= {name: bound[prefix + name] for name in buffers}

    def _is_late(self) -> bool:
        saves = self._recompute if torch.is_grad_enabled() else self._saves
        return saves and len(self._transforms) > 0 and is_plain_eager()

    def _when_read(self, others: dict[str, Tensor], raw: RawTree, state: StateTree) -> Values:
        return _Late(Reading(self._transforms, raw, state, self._spans), others)

    def _as_compilers_do(self, others: dict[str, Tensor], raw: RawTree, state: StateTree) -> Values:
        """All values. A compiler chooses what backward gets; of a checkpoint's inside, nothing."""
        for name, transform in self._transforms.items():
            own = raw[name], state.get(name, {})
            others[name] = cast(
                "Tensor",
                _checkpoint(transform.forward, *own, use_reentrant=False, preserve_rng_state=False),
            )
        for entry in self.parametrization.entries:
            others.update(dict.fromkeys(entry.names, others[entry.name]))
        return others

    def _of_the_rest(self, raw: RawTree, state: StateTree) -> tuple[RawTree, StateTree]:
        """The part of raw and state of the values that are made at once; all of it was checked."""
        self.parametrization._check(raw, state)  # pyright: ignore[reportPrivateUsage]
        names = [entry.name for entry in self._rest.entries]
        own = {name: state[name] for name in names if name in state}
        return {name: raw[name] for name in names}, own


class _Reader(nn.Module):
    """The network, which reads its values while it runs; a module, for `FunctionalCall` to bind."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._places: list[Place] = []

    def forward(
        self,
        reading: Reading,
        absent: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        found = (getattr(owner, key, None) is absent[name] for owner, key, name in self._places)
        if not self._places or not all(found):  # the first call, or the network was changed
            self._places = _places(self.net, {id(t): name for name, t in absent.items()})
        with reading.at(self._places):
            return self.net(*args, **kwargs)


def _places(net: nn.Module, names: Mapping[int, str]) -> list[Place]:
    """Where the tensors of these ids sit."""
    return [
        (owner, key, names[id(leaf.tensor)])
        for leaf in flatten(net)[0]
        if id(leaf.tensor) in names
        for owner, key in leaf.owners
    ]


def _later(net: nn.Module, p: Parametrization[dict[str, Tensor]]) -> list[Entry]:
    """The parameters that are worth it: large ones, which no stack takes."""
    parameters = {name for leaf in flatten(net)[0] if not leaf.is_buffer for name in leaf.names}
    groups = p._plan.groups  # pyright: ignore[reportPrivateUsage]
    alone = {name for group in groups if group.obstacle for name in group.names} & parameters
    return [e for e in p.entries if e.name in alone and _bytes(e) >= SMALLEST]


def _saves(later: list[Entry]) -> bool:
    """Whether it takes less memory to hold the values of one module than all of them."""
    sizes = {name: _bytes(entry) for entry in later for name in entry.names}
    owners: Counter[str] = Counter()
    for name, size in sizes.items():
        owners[name.rpartition(".")[0]] += size
    return sum(map(_bytes, later)) > max(owners.values(), default=0)


def _bytes(entry: Entry) -> int:
    value = entry.signature.value
    return prod(value.shape) * value.dtype.itemsize


def _absent(entry: Entry) -> Tensor:
    """What is bound until the value is made."""
    value = entry.signature.value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def recompute(net: nn.Module, p: Parametrization[dict[str, Tensor]]) -> ParametrizedCall:
    """Prepare `net` to be called with values of `p` that are made again when backward needs them.

    `recompute(net, p)(raw, state, args, kwargs)` returns what
    `functional_call(net, p(raw, state), args, kwargs)` returns, and the gradients are the same. In
    between no value is held: each is made when the network reads it, dropped when another module
    reads another one, and made once more in backward, the derivatives of its map at the same time.
    A value that has to be made anew in one call, because modules take turns, is kept for longer
    from then on.

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
    return ParametrizedCall(net, p, recompute=True)
