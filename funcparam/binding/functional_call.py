"""`torch.func.functional_call`, prepared once for a module, and its block for any method."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor, nn
from typing_extensions import Never

from funcparam.binding.binding import Binding, call_traced
from funcparam.binding.locks import hold
from funcparam.binding.places import Places, Tree
from funcparam.binding.reading import Reading
from funcparam.parametrization.names import closest
from funcparam.transforms.contract.signature import describe

Net = TypeVar("Net", bound=nn.Module)


@final
class FunctionalCall:
    """A module that is called with given tensors in place of its own.

    Made by [`functional_call`][funcparam.functional_call].
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._tree = Tree(net)

    def __call__(
        self,
        params: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        tie_weights: bool = True,
        strict: bool = False,
    ) -> Any:
        """Call the module with `params`, and leave it as it was.

        Args:
            params: tensors by name, or several dicts of them without common names. One name of a
                tie serves all. What the module writes over, running statistics for one, is
                replaced in the dict.
            args: positional arguments; anything but a tuple is the only one.
            kwargs: keyword arguments.
            tie_weights: whether one name of a tie serves all.
            strict: whether `params` has to have exactly the module's names.

        Raises:
            ValueError: names of one tie are given different tensors, or two dicts have a name
                in common.
            RuntimeError: names are missing or unknown with `strict`, or the module is scripted,
                traced or `DataParallel`.
            AttributeError, TypeError: a name leads nowhere, or to no tensor.
        """
        positional = cast("tuple[Any, ...]", args) if isinstance(args, tuple) else (args,)
        keywords = dict(kwargs or {})
        if strict or not tie_weights or not isinstance(params, dict):
            return self._by_torch(params, positional, keywords, tie_weights, strict)
        if torch.compiler.is_compiling():
            return self._traced(params, positional, keywords)
        return self.call(params, positional, keywords)

    def call(
        self,
        params: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reading: Reading | None = None,
    ) -> Any:
        """Call with `params` and what is made when the module reads it, outside of compilers."""
        tree = hold(self._tree, self._looked_up)  # other threads wait; this one may call again
        try:
            places = _places(tree, params)
            if places is None and reading is None:
                return self._by_torch(params, args, kwargs)
            if places is None or (reading is not None and not reading.finds(tree.at)):
                raise ValueError(_why_not(tree, params))
            tensors = [*params.values()]
            with Binding(tree.lock, places, tensors, reading):
                try:
                    return self.net(*args, **kwargs)
                finally:
                    params.update(places.written(tensors))
        finally:
            tree.lock.release()

    def __reduce__(self) -> Any:
        return FunctionalCall, (self.net,)

    @contextmanager
    def bound(self, values: Mapping[str, Tensor]) -> Generator[None]:
        """See [`bound`][funcparam.bound]."""
        for name, tensor in values.items():
            if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"values[{name!r}]: expected a tensor; got {describe(tensor)}")
        tree = hold(self._tree, self._looked_up)
        try:
            places = _places(tree, values)
            if places is None:
                raise ValueError(_why_not(tree, values))
            with Binding(tree.lock, places, [*values.values()]):
                yield
        finally:
            tree.lock.release()

    def _by_torch(
        self,
        params: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tie_weights: bool = True,  # noqa: FBT001
        strict: bool = False,  # noqa: FBT001
    ) -> Any:
        """Whatever is not proven to be the same is left to PyTorch."""
        return torch.func.functional_call(
            self.net, params, args, kwargs, tie_weights=tie_weights, strict=strict
        )

    def _looked_up(self) -> Tree:
        """The places of the network as it is."""
        if not self._tree.is_as_it_was():
            self._tree = Tree(self.net)
        return self._tree

    def _traced(
        self, params: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        at = self._tree.at
        first = {name: at[name][0] for name in params if name in at}
        given = {first[name]: tensor for name, tensor in params.items() if name in at}
        ties_agree = all(given[first[name]] is params[name] for name in first)
        if len(first) < len(params) or not ties_agree:
            return self._by_torch(params, args, kwargs)
        every = [(tensor, place) for name, tensor in params.items() for place in at[name]]
        out, after = call_traced(self.net, every, args, kwargs)
        params.update({name: after[place.path] for name, place in first.items()})
        return out


def _places(tree: Tree, params: Mapping[str, Any]) -> Places | None:
    """Where these tensors go; None if PyTorch has to say what to do with them."""
    if not all(issubclass(kind, Tensor) for kind in set(map(type, params.values()))):
        return None
    places = tree.places(list(params))
    if places is None or (places.repeated and not places.agree([*params.values()])):
        return None
    return places


def _why_not(tree: Tree, values: Mapping[str, Any]) -> str:
    for name in values:
        if name not in tree.at:
            return f"values: unknown name {name!r}; {closest(name, [*tree.at])}"
    return "values: names of one tie have two different tensors"


def functional_call(net: nn.Module, *torchs: Never) -> FunctionalCall:
    """Prepare `net` to be called with other tensors in place of its own.

    `functional_call(net)(params, args, kwargs)` returns what
    `torch.func.functional_call(net, params, args, kwargs)` returns, at about a tenth of its cost
    for many parameters: ties, buffers that the module replaces, and exceptions are treated alike.
    Two things are right that are not there: modules that are used at several places keep their own
    tensors, and `torch.utils.checkpoint` inside of the network computes again with `params`.
    Nested calls are served; threads take turns that share the network, or a part of it. Where names
    are unknown, a tie is given twice, or `strict` or no `tie_weights` is asked for, it is PyTorch's
    own.

    Args:
        net: the module. It may change afterwards, but its ties not once a compiled function has
            it.
        *torchs: nothing. PyTorch's own takes the parameters and the arguments here.

    Raises:
        TypeError: `net` is no module, or more is given.

    Example:
        >>> import torch, funcparam as fp
        >>> net = torch.nn.Linear(2, 1)
        >>> call = fp.functional_call(net)
        >>> call({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, (torch.ones(3, 2),))
        tensor([[2.],
                [2.],
                [2.]])
    """
    if not isinstance(net, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"functional_call expects a module; got {type(net).__name__}")
    if torchs:
        raise TypeError(
            f"functional_call expects the module alone; got {len(torchs)} more. What it returns is"
            " called with the rest: fp.functional_call(net)(params, args, kwargs)"
        )
    return FunctionalCall(net)


@contextmanager
def bound(net: Net, values: Mapping[str, Tensor]) -> Generator[Net]:
    """A block in which `net` has `values` in the place of its own tensors: call any method there.

    `with fp.bound(net, p(raw, state)): net.generate(prompt)` is for methods what
    [`functional_call`][funcparam.functional_call] is for `forward`. At its end, or where it fails,
    the network has its own tensors again. Other threads wait that bind it, or a part of it.

    Args:
        net: the module.
        values: tensors by name, such as `p(raw, state)` returns. One name of a tie serves all.

    Yields:
        `net` itself.

    Raises:
        TypeError: `net` is no module, or something in `values` is no tensor.
        ValueError: a name is not one of the module's, or names of one tie have different tensors.

    Example:
        >>> import torch, funcparam as fp
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> with fp.bound(net, {"weight": torch.ones(1, 2)}):
        ...     net.extra_repr(), net(torch.ones(1, 2))
        ('in_features=2, out_features=1, bias=False', tensor([[2.]]))
    """
    if not isinstance(net, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"bound expects a module; got {describe(net)}")
    with FunctionalCall(net).bound(values):
        yield net
