"""A layer of a shell's network, where the places of its weights are empty.

It names their raw among its parameters, or freezing the layer and giving its parameters to an
optimizer would pass them over without a word; and what initialises it says what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from funcparam.binding.slots import steps

_METHODS = ("named_parameters", "apply", "reset_parameters")


class Layer:
    """Methods of a module below which places are empty.

    Args:
        module: the module.
        raw: where raw is.
        owned: the path of each weight in `raw`: its names in `module`.
    """

    def __init__(self, module: nn.Module, raw: nn.Module, owned: Mapping[str, list[str]]) -> None:
        self.module = module
        self.raw = raw
        self.owned = owned
        self.before = {name: own for name in _METHODS if (own := vars(module).get(name))}

    def put(self) -> None:
        """Let the module have them, as bound methods, which copy and pickle with it."""
        has_own = any("." not in name for names in self.owned.values() for name in names)
        for name in _METHODS if has_own else _METHODS[:1]:
            if hasattr(self.module, name):
                vars(self.module)[name] = getattr(self, name)

    def take_away(self) -> None:
        """Let the module have its own, or those that a shell inside has put there."""
        for name in _METHODS:
            vars(self.module).pop(name, None)
        vars(self.module).update(self.before)

    def named_parameters(
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001
        remove_duplicate: bool = True,  # noqa: FBT001
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own, which has the values while it is bound, else with `raw.NAME`.

        What is asked of the module alone, without those below it, or for tensors at each of their
        places, is left as it is: who asks so walks through all modules and writes to these places.
        """
        found: set[str] = set()
        head = f"{prefix}." if prefix else ""
        call = self._before("named_parameters")
        for name, own in call(prefix=prefix, recurse=recurse, remove_duplicate=remove_duplicate):
            found.add(name)
            yield name, own
        if recurse and remove_duplicate:
            for path, names in self.owned.items():
                if not any(f"{head}{name}" in found for name in names):
                    for key, own in _below(self.raw, path):
                        yield f"{head}raw.{names[0]}{key}", own

    def apply(self, fn: Callable[[nn.Module], None]) -> nn.Module:
        """The module's own; where `fn` fails for want of a weight, the error says so."""

        def told(module: nn.Module) -> None:
            try:
                fn(module)
            except (AttributeError, TypeError) as error:
                if module is self.module:
                    self._expect_values(error)
                raise

        return self._before("apply")(told)

    def reset_parameters(self) -> None:
        """The module's own, if its weights are there."""
        self._expect_values()
        self._before("reset_parameters")()

    def _before(self, name: str) -> Any:
        return self.before.get(name) or partial(getattr(type(self.module), name), self.module)

    def _expect_values(self, error: Exception | None = None) -> None:
        for path, names in self.owned.items():
            if any("." not in name and getattr(self.module, name) is None for name in names):
                raise RuntimeError(
                    f"the module of {path!r} cannot be initialised: the weight has a rule, so its"
                    " value is computed, and its place is empty. Initialise the network before the"
                    " Parametrized is made, or in `with model.bound() as net:`, or load values:"
                    f" model.load_state_dict({{{path!r}: value}}, strict=False)"
                ) from error


def name_raw(net: nn.Module, raw: nn.Module, ties: Sequence[tuple[str, ...]]) -> None:
    """Let the modules of a network know raw, which is held at the first name of each tie."""
    owned: dict[nn.Module, dict[str, list[str]]] = {}
    for names in ties:
        for name in names:
            way = [(net, ""), *((child, key) for _, key, child in steps(net, name))]
            keys = [*(key for _, key in way[1:]), name.rpartition(".")[2]]
            for i, (module, _) in enumerate(way):
                own = owned.setdefault(module, {}).setdefault(names[0], [])
                own.append(".".join(keys[i:]))
    for module, own in owned.items():
        Layer(module, raw, own).put()


def unname_raw(net: nn.Module, raw: nn.Module) -> None:
    """Take away what `name_raw` left."""
    for module in net.modules():
        layer = getattr(vars(module).get(_METHODS[0]), "__self__", None)
        if isinstance(layer, Layer) and layer.raw is raw:
            layer.take_away()


def owner_of(method: Any) -> Any:
    """Whose method this is."""
    owner = method.__self__
    return owner.module if isinstance(owner, Layer) else owner


def _below(root: nn.Module, path: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the weight at a path, with what follows it in their names."""
    *parents, last = path.split(".")
    for key in parents:
        root = cast("nn.Module", vars(root)["_modules"][key])
    own: Any = vars(root)["_parameters"].get(last)
    if own is not None:
        yield "", own
    held = vars(root)["_modules"].get(last)
    if held is not None:
        for key, tensor in held.named_parameters():
            yield f".{key}", tensor
