"""The module shell: a parametrized network as an ordinary `nn.Module`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from funcparam.binding.call import ParametrizedCall, Values
from funcparam.binding.dotted import at, collect, layout, overwrite, paths, place
from funcparam.binding.fold import fold, replaced
from funcparam.binding.modes import is_in_backward
from funcparam.parametrization.boundary import RawTree, StateTree
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.tree import flatten
from funcparam.transforms.contract.base import Raw, State
from funcparam.transforms.contract.signature import describe


class Parametrized(nn.Module):
    """A network with its parametrization, for those who train with modules.

    It owns raw as parameters and state as buffers, and calls the network with the values, each
    evaluated once a forward. In training mode every forward first advances what evolves
    (`p.update`). Optimizers, `state_dict`, `.to`, `deepcopy`, `pickle`, `torch.compile` and
    `torch.export` work as on any module.

    `net` is copied: the one that was given stays as it is and shares nothing with this. The copy,
    `self.net`, keeps its classes, hooks and attributes; its own tensors are empty ones on the meta
    device, since the real ones are here:

    * `raw.NAME`, `raw.NAME.KEY`: parameters (buffers where `NAME` is a buffer of the network),
      with the `requires_grad` of the weights that they stand for (adapters always train);
    * `state.NAME.KEY`: buffers;
    * `net_buffers.NAME`: the network's own buffers, as persistent as they were.

    `load_state_dict` takes these keys, and whatever else
    [`checkpoint.read`][funcparam.checkpoint.read] understands: plain and folded checkpoints, those
    of PyTorch's parametrizations and of its hooks.

    Without gradients each large value is made when the network reads it and dropped afterwards.

    Threads that share it take turns (`DataParallel` replicas have networks of their own).
    Activation checkpointing goes around this module, not inside of the network, where it would
    compute again after the values are gone: an error about the meta device. What a network writes
    to a buffer that is itself parametrized goes to the value and is lost.

    Args:
        net: any module.
        p: a parametrization of it.
        generator: as for [`Parametrization.init`][funcparam.Parametrization.init].
        recompute: whether to drop large values in training too, and to make them again in
            backward; see [`funcparam.recompute`][]. It saves nothing under autocast, and is an
            error where the network itself calls `torch.func.grad` or `vjp`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `p.init(net)`.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import SpectralNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> model = fp.Parametrized(net, fp.parametrize(net, {"weight": SpectralNorm()}))
        >>> list(model.state_dict())
        ['raw.weight', 'raw.bias', 'state.weight.u', 'state.weight.v']
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> type(model.fold())
        <class 'torch.nn.modules.linear.Linear'>
    """

    net: nn.Module
    _call: ParametrizedCall
    parametrization: Parametrization[dict[str, Tensor]]

    def __init__(
        self,
        net: nn.Module,
        p: Parametrization[dict[str, Tensor]],
        *,
        generator: torch.Generator | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(p, Parametrization):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"expected a parametrization; got {describe(p)}. fp.parametrize(net, rules) makes"
                " one"
            )
        raw, state = p.init(net, generator=generator)
        _expect_same_ties(net, p)
        self.parametrization = p
        self.recompute = recompute
        self._layout = list(map(layout, p.entries))
        self.raw = nn.Module()
        self.state = nn.Module()
        self.net_buffers = nn.Module()
        self._buffer_names: dict[str, str] = {}
        for leaf in flatten(net)[0]:
            name = leaf.names[0]
            if name in raw:
                adapts = name in p and p[name].is_adapter
                grad = (leaf.tensor.requires_grad or adapts) and not leaf.is_buffer
                for path, tensor in paths(name, raw[name]):
                    own = tensor if leaf.is_buffer else nn.Parameter(tensor, requires_grad=grad)
                    place(self.raw, path, own)
                for path, tensor in paths(name, state.get(name, {})):
                    place(self.state, path, tensor)
            else:
                persistent = any(map(_is_persistent, leaf.owners))
                place(self.net_buffers, name, leaf.tensor.detach().clone(), persistent=persistent)
                self._buffer_names |= dict.fromkeys(leaf.names, name)
        # Not a child: its tensors are placeholders that nobody should train, move or save.
        self._own(replaced(net, _to_meta))
        super().train(net.training)  # and each part of the network as it was

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with the parametrized values."""
        with self._call.turn():
            raw, state = self.raw_and_state()
            evolves = self.training and not is_in_backward()  # where a checkpoint computes again
            values = self._advanced(raw, state) if evolves else self._call.values(raw, state)
            buffers = self._own_buffers()
            bound = dict(buffers)
            out = self._call.apply(values, args, kwargs, bound)
            for name, old in buffers.items():
                if bound[name] is not old:  # the network put another tensor in its buffer's place
                    owner, _, local = self._buffer_names[name].rpartition(".")
                    setattr(self.net_buffers.get_submodule(owner), local, bound[name].detach())
            return out

    def _replicate_for_data_parallel(self) -> Self:
        """Give each replica, which runs in a thread of its own, a network of its own to bind."""
        replica = super()._replicate_for_data_parallel()  # pyright: ignore
        replica._own(deepcopy(self.net))
        return replica

    def _own(self, net: nn.Module) -> None:
        """Take `net` as the network, past nn.Module, which would count its tensors as ours."""
        object.__setattr__(self, "net", net)
        call = ParametrizedCall(net, self.parametrization, recompute=self.recompute)
        object.__setattr__(self, "_call", call)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001
        """Set training mode here and in the network."""
        if "net" in self.__dict__:
            self.net.train(mode)
        return super().train(mode)

    def raw_and_state(self) -> tuple[dict[str, Raw], dict[str, State]]:
        """Return this module's own tensors as `p` takes them; nothing is copied."""
        return collect(self._layout, self.raw, self.state)

    def values(self) -> dict[str, Tensor]:
        """Return the parameters that the network is called with, under its own names.

        After `fully_shard` they are whole tensors, gathered from all processes.
        """
        return self.parametrization(*map(_whole, self.raw_and_state()))

    def rebase(self) -> None:
        """Move base points to the current values, in place; see [`Parametrization.rebase`][].

        An optimizer's momentum belongs to the old raw: set it to zero.
        """
        raw, state = self.raw_and_state()
        with torch.no_grad():
            new_raw, new_state = self.parametrization.rebase(raw, state)
            overwrite(raw, new_raw)
            overwrite(state, new_state)

    def fold(self) -> nn.Module:
        """Return a plain copy of the network with the values written into it.

        It has the classes, hooks, names, order and `requires_grad` of the network that was given,
        does not need funcparam, and shares no memory with this module.
        """
        return fold(self.net, {**self._own_buffers(), **self.values()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take checkpoints in any spelling; of one in this module's own, everything is as usual."""
        given = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        if given and self.state_dict().keys().isdisjoint(given):
            try:
                own = self._respelt(given)
            except (TypeError, ValueError) as error:
                cast("list[str]", args[-1]).append(str(error))
            else:
                for key in given:
                    del state_dict[prefix + key]
                state_dict |= {prefix + key: tensor for key, tensor in own.items()}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _respelt(self, given: Mapping[str, Any]) -> dict[str, Any]:
        from funcparam.checkpoint import read, write  # a third of the time to import funcparam

        raw, state, others = read(given, self.parametrization)
        buffers = {self._buffer_names.get(name, name): t for name, t in others.items()}
        return write(self.parametrization, raw, state, buffers)

    def extra_repr(self) -> str:
        """Show the network and the parametrization."""
        return f"net={self.net!r}\n{self.parametrization!r}"

    def _advanced(self, raw: RawTree, state: StateTree) -> Values:
        """Update the state, and return the values.

        Those have tensors of their own, which a later update does not write to: several forwards
        may come before one backward, which needs the state of each.
        """
        values, new = self._call.advanced(raw, state)
        overwrite(state, new)
        return values

    def _own_buffers(self) -> dict[str, Tensor]:
        return {name: at(self.net_buffers, first) for name, first in self._buffer_names.items()}


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _expect_same_ties(net: nn.Module, p: Parametrization[dict[str, Tensor]]) -> None:
    """Raise unless every parameter of `net` is an entry of `p` under the same names."""
    expected = {entry.names for entry in p.entries}
    for leaf in flatten(net)[0]:
        if not leaf.is_buffer and leaf.names not in expected:
            raise ValueError(
                f"{leaf.names[0]!r}: expected the ties of the network that p was made for; got"
                f" {' = '.join(leaf.names)}. Make p with fp.parametrize(net, rules)"
            )


def _is_persistent(owner: tuple[nn.Module, str]) -> bool:
    module, name = owner
    return name not in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]


def _whole(tree: Any) -> Any:
    """The tree with sharded tensors gathered; any other tensor is its own whole."""
    if isinstance(tree, Mapping):
        items = cast("Mapping[str, Any]", tree).items()
        return {name: _whole(tensor) for name, tensor in items}
    gather = getattr(tree, "full_tensor", None)
    return tree if gather is None else gather()
