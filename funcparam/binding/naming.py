"""A layer of a shell's network names the raw of its weights among its parameters.

The places of these are empty, so freezing a layer, or giving its parameters to an optimizer, would
pass them over without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn

from funcparam.binding.slots import steps

_METHOD = "named_parameters"


class Naming:
    """Lists the parameters of a module below which places are empty.

    What is asked of the module alone, without those below it, or for tensors at each of their
    places, is left as it is: who asks so walks through all modules and writes to these places.

    Args:
        module: the module.
        raw: where raw is.
        owned: the path of each weight in `raw`: its names in `module`.
    """

    def __init__(self, module: nn.Module, raw: nn.Module, owned: Mapping[str, list[str]]) -> None:
        self.module = module
        self.raw = raw
        self.owned = owned
        self.before = vars(module).get(_METHOD)  # of a shell inside

    def named_parameters(
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001
        remove_duplicate: bool = True,  # noqa: FBT001
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own, which has the values while it is bound, else with `raw.NAME`."""
        found: set[str] = set()
        head = f"{prefix}." if prefix else ""
        call = self.before or type(self.module).named_parameters.__get__(self.module)
        for name, own in call(prefix=prefix, recurse=recurse, remove_duplicate=remove_duplicate):
            found.add(name)
            yield name, own
        if recurse and remove_duplicate:
            for path, names in self.owned.items():
                if not any(f"{head}{name}" in found for name in names):
                    for key, own in _below(self.raw, path):
                        yield f"{head}raw.{names[0]}{key}", own


def name_raw(net: nn.Module, raw: nn.Module, ties: Sequence[tuple[str, ...]]) -> None:
    """Let the modules of a network name raw, which is held at the first name of each tie."""
    owned: dict[nn.Module, dict[str, list[str]]] = {}
    for names in ties:
        for name in names:
            way = [(net, ""), *((child, key) for _, key, child in steps(net, name))]
            keys = [*(key for _, key in way[1:]), name.rpartition(".")[2]]
            for i, (module, _) in enumerate(way):
                own = owned.setdefault(module, {}).setdefault(names[0], [])
                own.append(".".join(keys[i:]))
    for module, own in owned.items():
        # a bound method, as compilers expect, which copies and pickles with its module
        vars(module)[_METHOD] = Naming(module, raw, own).named_parameters


def unname_raw(net: nn.Module, raw: nn.Module) -> None:
    """Take away what `name_raw` left."""
    for module in net.modules():
        naming = getattr(vars(module).get(_METHOD), "__self__", None)
        if isinstance(naming, Naming) and naming.raw is raw:
            del vars(module)[_METHOD]
            if naming.before is not None:
                vars(module)[_METHOD] = naming.before


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
