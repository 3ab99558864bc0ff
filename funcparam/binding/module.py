"""The module shell: a parametrized network as an ordinary `nn.Module`, and back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from os import PathLike
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from funcparam.binding import attributes, loading
from funcparam.binding.binding import Binding, call_traced, traced
from funcparam.binding.dotted import (
    Held,
    changed,
    collect,
    layout,
    overwrite,
    refilled,
)
from funcparam.binding.evaluation import Evaluation, Values
from funcparam.binding.fold import copy_of
from funcparam.binding.guard import guard, unguard
from funcparam.binding.kinds import kind
from funcparam.binding.layers import name_raw, unname_raw
from funcparam.binding.locks import hold
from funcparam.binding.making import evolves, gathered, parts_of
from funcparam.binding.modes import Modes, fx_tracer
from funcparam.binding.pins import is_checkpointed, settle
from funcparam.binding.places import Place
from funcparam.binding.slots import Slots, places, refuse_write
from funcparam.binding.writing import to_raw
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.sharding import whole
from funcparam.parametrization.table import Table
from funcparam.transforms.contract.base import Raw, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Tree: TypeAlias = "tuple[dict[str, Raw], dict[str, State]]"
"""Raw and state."""


class Parametrized(nn.Module):
    """A network with its parametrization, for those who train with modules.

    `self.net` is a copy of the network that was given, which stays as it is; a child like any
    other. It has its classes, attributes, hooks and buffers, and all parameters that no rule picks.
    The place of a weight that has a rule is empty there (`None`): its raw is a parameter of
    `self.raw`, its state a buffer of `self.state`. A call evaluates each map once, puts the values
    into the network, calls it, and takes them out again. In training mode it first advances what
    evolves (`p.update`).

    Whatever a module can do, this can: optimizers, `.to`, `apply`, hooks, `deepcopy`, `pickle`,
    `torch.compile`, `torch.export`. Attributes of the network are reached through it, and its
    methods run with the values in place: `model.config`, `model.generate(...)`. Activation
    checkpoints, `torch.utils.checkpoint`, may be inside of the network and around it.

    The keys of `state_dict` are

    * `raw.NAME`, `raw.NAME.KEY`: the parameters of a weight with a rule (buffers where `NAME` is a
      buffer of the network), with the `requires_grad` of that weight (adapters always train);
    * `state.NAME.KEY`: its buffers;
    * `net.NAME`: everything else, as the network itself has it.

    `load_state_dict` takes these keys, and whatever else
    [`checkpoint.read`][funcparam.checkpoint.read] understands: plain and folded checkpoints, those
    of PyTorch's parametrizations and of its hooks.

    Without gradients each large value is made when the network reads it and dropped afterwards.
    Threads that share it, or a part of its network, take turns. What `forward` writes to a value is
    lost with it; what other methods write, or a [`bound`][..bound] block, goes to raw by the right
    inverse.

    Args:
        net: any module.
        p: a parametrization of it.
        raw: what to start from, as [`Parametrization.init`][funcparam.Parametrization.init] returns
            it, in the place of the network's weights; copied. [`raw_and_state`][..raw_and_state] is
            the way back.
        state: likewise.
        generator: as for `init`.
        recompute: whether to drop large values in training too, and to make them again in
            backward; see [`funcparam.recompute`][]. It saves nothing under autocast, and is an
            error where the network itself calls `torch.func.grad` or `vjp`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `p.init(net)`, or `p(raw, state)`.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import SpectralNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> model = fp.Parametrized(net, fp.parametrize(net, {"weight": SpectralNorm()}))
        >>> list(model.state_dict())
        ['net.bias', 'raw.weight', 'state.weight.u', 'state.weight.v']
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> type(model.fold())
        <class 'torch.nn.modules.linear.Linear'>
    """

    net: nn.Module
    parametrization: Parametrization[dict[str, Tensor]]

    _base: ClassVar[type[Parametrized]]
    _made_for: ClassVar[type[nn.Module]]

    if not TYPE_CHECKING:  # which should see the arguments of __init__ alone

        def __new__(cls, net: Any = None, *_: Any, **__: Any) -> Any:
            """Make one of the class that has the signature of the network's `forward`."""
            own = cls if net is None else _kind(cls.__dict__.get("_base", cls), type(net))
            return super().__new__(own)

    def __init__(
        self,
        net: nn.Module,
        p: Parametrization[dict[str, Tensor]],
        *,
        raw: Mapping[str, Raw] | None = None,
        state: Mapping[str, State] | None = None,
        generator: torch.Generator | None = None,
        recompute: bool = False,
    ) -> None:
        self.set_up(net, p, {}, (raw, state), generator, recompute=recompute)

    def set_up(
        self,
        net: nn.Module,
        p: Parametrization[dict[str, Tensor]],
        memo: dict[int, Any],
        given: tuple[Mapping[str, Raw] | None, Mapping[str, State] | None],
        generator: torch.Generator | None,
        *,
        recompute: bool,
    ) -> None:
        """Do what making one does, with what is copied already in a memo of deepcopy."""
        super().__init__()
        parts = parts_of(net, p, memo, given, generator)
        ruled = self._ruled = parts.ruled
        self.parametrization, self.recompute = p, recompute
        self._layout, self._flags = list(map(layout, ruled.entries)), parts.flags
        names = {name for entry in ruled.entries for name in entry.names}
        self._evaluation = Evaluation(ruled, names - parts.buffers, recompute=recompute)
        self._evolves = evolves(ruled)
        vars(self)["_modules"] |= {"net": parts.net, "raw": Held(), "state": Held()}
        parts.hold(self.raw, self.state)
        guard(place for own in self._looked_up().at.values() for place in own)
        name_raw(parts.net, self.raw, [entry.names for entry in ruled.entries])
        self.register_load_state_dict_post_hook(loading.in_words_of_the_file)
        self.training = net.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with the parametrized values."""
        if torch.compiler.is_compiling() and not (self.training and self._evolves):
            return call_traced(self._net, self._traced(), args, kwargs)[0]
        if (tracer := fx_tracer(args, kwargs)) is not None:
            path = tracer.path_of_module(self)
            return tracer.create_proxy("call_module", path, args, kwargs)
        with self._block(self._next):
            return self._net(*args, **kwargs)

    @contextmanager
    def bound(self) -> Generator[nn.Module]:
        """A block in which the network has the values: call any method of it there.

        In training mode it first advances what evolves, as a call does.

        Yields:
            The network, `self.net`. What was written to a value, under `torch.no_grad()` and not by
            `.data`, goes to raw by the right inverse; a compiler does not notice it.

        Raises:
            ValueError: a value that was written is none that its transform takes.
            RuntimeError: it is not clear what was written. In both cases raw is as before.

        Example:
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import Positive
            >>> net = torch.nn.Embedding.from_pretrained(torch.ones(3, 2))
            >>> model = fp.Parametrized(net, fp.parametrize(net, {"weight": Positive()}))
            >>> with model.bound() as net:
            ...     net.weight.sum()
            tensor(6.)
        """
        with self._block(self._next_to_watch) as binding, to_raw(self, binding):
            yield self._net

    @contextmanager
    def _block(self, make: Callable[[], Values]) -> Generator[Binding | None]:
        if torch.compiler.is_compiling():  # which follows every table, and needs no lock
            with traced(self._traced()):
                yield None
            return
        slots = hold(self.__dict__.get("_slots") or self._looked_up(), self._looked_up)
        try:
            slots.expect_empty()
            tensors, reading = make()
            places = slots.every
            if reading is not None:
                places = slots.of(self._evaluation.at_once)
                reading.finds(slots.at)
            values = [tensors[name] for name in places.names]
            with Binding(slots.lock, places, values, reading) as binding:
                yield binding
        finally:
            slots.lock.release()

    def __getattr__(self, name: str) -> Any:
        """What this has not, the network has; its methods run with the values in place."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            net = self.__dict__.get("_modules", {}).get("net")
            if net is None or name.startswith("__"):
                raise
        return attributes.get(self, net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What this has not, and the network has, is set there, where something reads it."""
        if not attributes.put(self, name, value):
            super().__setattr__(name, value)

    def raw_and_state(self) -> tuple[dict[str, Raw], dict[str, State]]:
        """Return the tensors of this module as `p` takes them; nothing is copied.

        Under the name of a weight that has no rule it is the network's own parameter.
        """
        self._expect_empty()
        raw, state = self._own()
        every = {
            e.name: raw[e.name] if e.transform else places(self._net, e.names)[0].read()
            for e in self.parametrization.entries
        }
        return every, state

    def values(self) -> dict[str, Tensor]:
        """Return the parameters that the network is called with, under its own names.

        After `fully_shard` they are whole tensors, gathered from all processes.
        """
        return self.parametrization(*whole(self.raw_and_state()))

    def violation(self) -> dict[str, Tensor]:
        """How far each value is from its constraint: [`Parametrization.violation`][]."""
        raw, state = whole(self.raw_and_state())
        return self.parametrization.violation(self.parametrization(raw, state), state)

    def summary(self) -> Table:
        """What is trained, as a table: [`Parametrization.summary`][]."""
        with torch.no_grad():
            return self.parametrization.summary(*whole(self.raw_and_state()))

    def plot(self) -> Figure:
        """Draw violations and singular values: [`Parametrization.plot`][]."""
        with torch.no_grad():
            return self.parametrization.plot(*whole(self.raw_and_state()))

    def __repr__(self) -> str:
        net = repr(self._net).replace("\n", "\n  ")
        table = repr(self.parametrization).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {net}\n  {table}\n)"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(repr(self._net))}</pre>{self.summary()._repr_html_()}"  # pyright: ignore

    # Changing

    def rebase(self) -> None:
        """Move base points to the current values, in place; see [`Parametrization.rebase`][].

        An optimizer's momentum belongs to the old raw: `fp.move(p, p, *model.raw_and_state(),
        optimizer)` does the same and carries it along.
        """
        raw, state = self._own()
        with torch.no_grad():
            new_raw, new_state = self._ruled.rebase(*whole((raw, state)))
            overwrite(*changed(raw, new_raw))
            overwrite(*changed(state, new_state))

    def refresh(self) -> None:
        """Make state exact for the raw that is there, in place; see [`Parametrization.refresh`][].

        For an average of such modules, whose buffers are means or another module's.
        """
        raw, state = self._own()
        with torch.no_grad():
            overwrite(*changed(state, self._ruled.refresh(*whole((raw, state)))))

    def fold(self) -> nn.Module:
        """Return a plain copy of the network with the values written into it.

        It has the classes, hooks, names, order and `requires_grad` of the network that was given,
        does not need funcparam, and shares no memory with this module.
        """
        return self.fold_with({})

    def fold_with(self, memo: dict[int, Any]) -> nn.Module:
        """The same with what is copied already in a memo of deepcopy."""
        self._expect_empty()
        values = self._ruled(*whole(self._own()))
        memo |= {i: own for i, own in gathered(self._net).items() if i not in memo}
        memo[id(self.raw)] = self.raw
        net = copy_of(self._net, memo)
        unguard(net)
        unname_raw(net, self.raw)
        for entry in self._ruled.entries:
            value = values[entry.name].detach().clone(memory_format=torch.contiguous_format)
            for slot in places(net, entry.names):
                if slot.table == "_parameters" and not isinstance(value, nn.Parameter):
                    value = nn.Parameter(value, self._flags[entry.name])
                setattr(slot.owner, slot.key, value)
        return net

    # Saving and loading

    @classmethod
    def from_checkpoint(
        cls,
        net: nn.Module,
        file: str | PathLike[str] | Mapping[str, Any],
        p: Parametrization[dict[str, Tensor]] | None = None,
        *,
        known: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make one of a network and a file that says which transforms wrote it.

        The weights of the network are not looked at: they need not satisfy anything.

        Args:
            net: a network as the file's was; it is copied.
            file: what [`checkpoint.load`][funcparam.checkpoint.load] takes, or returns.
            p: a parametrization of `net`, where the file does not say its transforms, or others
                are wanted.
            known: as for [`checkpoint.parametrization`][funcparam.checkpoint.parametrization].

        Raises:
            ValueError: the file does not say its transforms, and there is no `p`; or it is of
                another network.

        Example:
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import Positive
            >>> net = torch.nn.Linear(3, 2)  # of which some weights are negative
            >>> p = fp.parametrize(net, {"weight": Positive()})
            >>> values = {name: tensor.exp() for name, tensor in net.state_dict().items()}
            >>> file = fp.checkpoint.write(p, *p.init(values))
            >>> fp.Parametrized.from_checkpoint(net, file).parametrization == p
            True
        """
        found, p = loading.contents_for(net, file, p, known)
        model = cls(net, p, raw=found.raw, state=found.state)
        loading.load_others(model.net, found)
        return model

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata: dict[str, Any] = getattr(destination, "_metadata", {})
        loading.say(self, metadata.setdefault(prefix[:-1], {}))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        """Take checkpoints in any spelling; of one in this module's own, everything is as usual."""
        loading.respell(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest, **kwargs)

    def __reduce_ex__(self, _: Any) -> Any:
        own = {name: item for name, item in self.__dict__.items() if name != "_slots"}
        return _blank, (type(self)._base, type(self)._made_for), own

    @property
    def _net(self) -> nn.Module:
        return cast("nn.Module", self._modules["net"])

    def _own(self) -> Tree:
        """Raw and state of what has a rule."""
        held = cast("dict[str, nn.Module]", self._modules)
        return collect(self._layout, held["raw"], held["state"])

    def _next(self, own: Tree | None = None) -> Values:
        """The values of the next call.

        They have tensors of their own, which a later update does not write to: several forwards
        may come before one backward, which needs the state of each.
        """
        raw, state = own or self._own()
        if not (self.training and self._evolves):
            return self._evaluation.values(raw, state)
        tracing = torch.compiler.is_dynamo_compiling()
        if not tracing and (torch.compiler.is_compiling() or not is_checkpointed()):
            values, new = self._evaluation.advanced(raw, state)
            overwrite(*changed(state, new))
            return values
        new = self._ruled.update(raw, state)
        olds, news = changed(state, new)
        used, kept = settle(olds, news)
        overwrite(olds, kept)
        return self._evaluation.values(raw, refilled(state, new, used))

    def _next_to_watch(self) -> Values:
        """The same, whole, and counting what is written to them."""
        with Modes(()).entered():
            return self._next(whole(self._own()))

    def _expect_empty(self) -> None:
        if not torch.compiler.is_compiling():  # which need not guard on every table
            self._looked_up().expect_empty()

    def _looked_up(self) -> Slots:
        """The places of the values; a replica, or a network that was changed, has others."""
        slots = self.__dict__.get("_slots")
        if slots is None or not slots.is_as_it_was(self._net):
            slots = Slots(self._net, [entry.names for entry in self._ruled.entries])
            self.__dict__["_slots"] = slots
        return slots

    def _traced(self) -> list[tuple[Tensor, Place]]:
        """The values of the next call for a compiler, and where they go."""
        found = [(e.name, at) for e in self._ruled.entries for at in places(self._net, e.names)]
        for name, at in found:
            if isinstance(at.read(), nn.Parameter):  # what a block around this put there is none
                refuse_write(name)
        tensors = self._next().tensors
        return [(tensors[name], at) for name, at in found]


def _kind(base: type[Parametrized], net: type[nn.Module]) -> type[Parametrized]:
    return kind(base, net, cast("FunctionType", Parametrized.forward))


def _blank(base: type[Parametrized], net: type[nn.Module]) -> Parametrized:
    """One without anything, for copies and pickles to fill."""
    return nn.Module.__new__(_kind(base, net))
