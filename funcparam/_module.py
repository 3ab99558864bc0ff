"""The module shell: a parametrized network as an ordinary `nn.Module`, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from funcparam._boundary import Entry, RawTree, StateTree
from funcparam._call import ParametrizedCall, Values
from funcparam._modes import is_in_backward
from funcparam._names import closest
from funcparam._parametrization import Parametrization
from funcparam._tree import flatten
from funcparam.transforms._base import Raw, State
from funcparam.transforms._signature import TensorSpec, describe

Layout: TypeAlias = "tuple[str, list[str], list[str] | None, list[str]]"
"""The name of a leaf, in parts too, and the keys of its raw, None for a tensor, and state."""


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
        self._layout = list(map(_layout, p.entries))
        self.raw = nn.Module()
        self.state = nn.Module()
        self.net_buffers = nn.Module()
        self._buffer_names: dict[str, str] = {}
        for leaf in flatten(net)[0]:
            name = leaf.names[0]
            if name in raw:
                adapts = name in p and p[name].is_adapter
                grad = (leaf.tensor.requires_grad or adapts) and not leaf.is_buffer
                for path, tensor in _paths(name, raw[name]):
                    own = tensor if leaf.is_buffer else nn.Parameter(tensor, requires_grad=grad)
                    _place(self.raw, path, own)
                for path, tensor in _paths(name, state.get(name, {})):
                    _place(self.state, path, tensor)
            else:
                persistent = any(map(_is_persistent, leaf.owners))
                _place(self.net_buffers, name, leaf.tensor.detach().clone(), persistent=persistent)
                self._buffer_names |= dict.fromkeys(leaf.names, name)
        # Not a child: its tensors are placeholders that nobody should train, move or save.
        self._own(_replaced(net, _to_meta))
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
        raw: dict[str, Raw] = {}
        state: dict[str, State] = {}
        for name, parents, raw_keys, state_keys in self._layout:
            if raw_keys is None:
                raw[name] = _tensor(_module_at(self.raw, parents[:-1]), parents[-1])
            else:
                raw[name] = _below(self.raw, parents, raw_keys)
            if state_keys:
                state[name] = _below(self.state, parents, state_keys)
        return raw, state

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
            _write(raw, new_raw)
            _write(state, new_state)

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
        with torch.no_grad():
            _write(state, new)
        return values

    def _own_buffers(self) -> dict[str, Tensor]:
        return {name: _at(self.net_buffers, first) for name, first in self._buffer_names.items()}


def fold(net: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a plain copy of `net` with `values` written into it.

    Args:
        net: any module; it stays as it is. Its tensors that `values` does not name are copied.
        values: tensors by name, such as `p(raw, state)` returns. One name of a tie is enough.

    Returns:
        A module with the classes, names, order and `requires_grad` of `net`, which shares no
        memory with `net` or `values` and does not need funcparam.

    Raises:
        TypeError: `values` is not a mapping.
        ValueError: a name is not one of the module's, or a shape differs.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import Orthogonal
        >>> net = torch.nn.Linear(2, 2)
        >>> p = fp.parametrize(net, {"weight": Orthogonal()})
        >>> plain = fp.fold(net, p(*p.init(net)))
        >>> list(plain.state_dict())
        ['weight', 'bias']
    """
    if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"values: expected a dict of tensors; got {describe(values)}")
    leaves = {name: leaf for leaf in flatten(net)[0] for name in leaf.names}
    chosen: dict[int, Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"values[{name!r}]: expected a tensor; got {describe(value)}. fold takes values,"
                " p(raw, state), not raw"
            )
        if name not in leaves:
            raise ValueError(f"values: unknown name {name!r}; {closest(name, [*leaves])}")
        old = leaves[name].tensor
        if old.shape != value.shape:
            raise ValueError(
                f"values[{name!r}]: expected shape {tuple(old.shape)}; got {tuple(value.shape)}"
            )
        if chosen.setdefault(id(old), value) is not value:
            raise ValueError(f"values: {name!r} is tied; got two different tensors for its tie")

    def write(old: Tensor) -> Tensor:
        new = chosen.get(id(old), old)
        return torch.empty_like(old, dtype=new.dtype, device=new.device).copy_(new.detach())

    return _replaced(net, write)


def _replaced(net: nn.Module, new: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy `net` with `new(t)` in the place of each of its parameters and buffers `t`.

    As a memo of deepcopy, so that ties stay ties, and lists of weights that modules keep beside
    their parameters (RNNs do) hold the new ones too.
    """
    memo: dict[int, Any] = {}
    for leaf in flatten(net)[0]:
        old = leaf.tensor
        tensor = new(old)
        memo[id(old)] = (
            tensor if leaf.is_buffer else nn.Parameter(tensor, requires_grad=old.requires_grad)
        )
    try:
        return deepcopy(net, memo)
    except RuntimeError as error:
        for prefix, part in cast("Iterator[tuple[str, nn.Module]]", net.named_modules()):
            for name, item in vars(part).items():
                if isinstance(item, Tensor) and not item.is_leaf:
                    path = f"{prefix}." * bool(prefix) + name
                    raise RuntimeError(
                        f"{path!r}: expected a weight that can be copied; got one that a hook"
                        " computed. Remove the hook first (remove_weight_norm,"
                        " remove_spectral_norm), or make it under funcparam.compat.installed()"
                    ) from error
        raise


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


def _at(root: nn.Module, path: str) -> Tensor:
    *parents, key = path.split(".")
    return _tensor(_module_at(root, parents), key)


def _below(root: nn.Module, path: list[str], keys: list[str]) -> dict[str, Tensor]:
    """The tensors of one leaf, whose keys may be dotted; one without any has no module."""
    if not keys:
        return {}
    owner = _module_at(root, path)
    return {key: _at(owner, key) if "." in key else _tensor(owner, key) for key in keys}


def _module_at(root: nn.Module, path: list[str]) -> nn.Module:
    """The module below `root`; quicker than attributes, which `nn.Module` looks up in Python."""
    for name in path:
        root = cast("nn.Module", root._modules[name])  # pyright: ignore[reportPrivateUsage]
    return root


def _tensor(owner: nn.Module, key: str) -> Tensor:
    """The attribute, sooner where it is what it was registered as."""
    found = owner._parameters.get(key)  # pyright: ignore[reportPrivateUsage]
    if found is None:
        found = owner._buffers.get(key)  # pyright: ignore[reportPrivateUsage]
    return getattr(owner, key) if found is None else found


def _layout(entry: Entry) -> Layout:
    spec = entry.signature
    keys = None if isinstance(spec.raw, TensorSpec) else [key for key, _ in spec.raw]
    return entry.name, entry.name.split("."), keys, [key for key, _ in spec.state]


def _paths(name: str, tensors: Raw) -> list[tuple[str, Tensor]]:
    """The tensors of one leaf with their dotted paths."""
    if isinstance(tensors, Tensor):
        return [(name, tensors)]
    return [(f"{name}.{key}", tensor) for key, tensor in tensors.items()]


def _place(root: nn.Module, path: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Register `tensor` at a dotted path below `root`, making plain modules on the way."""
    *parents, local = path.split(".")
    for parent in parents:
        if parent not in root._modules:  # pyright: ignore[reportPrivateUsage]
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(local, tensor)
    else:
        root.register_buffer(local, tensor, persistent=persistent)


def _write(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Copy what changed into the tensors of `old`."""
    changed: list[tuple[Tensor, Tensor]] = []
    for name, given in new.items():
        own = old[name]
        if isinstance(given, Tensor):
            changed.append((own, given))
        else:
            changed += [(own[key], tensor) for key, tensor in given.items()]
    changed = [(own, given) for own, given in changed if given is not own]
    if changed:
        torch._foreach_copy_(*map(list, zip(*changed, strict=True)))  # pyright: ignore
