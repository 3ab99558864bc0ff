"""A shell around each block of a network, from one set of rules, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from funcparam.binding.module import Parametrized
from funcparam.parametrization.parametrize import parametrize
from funcparam.parametrization.selection import Rules
from funcparam.transforms.contract.signature import describe

Block: TypeAlias = (
    "type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool]"
)


def shells(
    net: nn.Module,
    rules: Rules,
    *,
    block: Block,
    generator: torch.Generator | None = None,
    recompute: bool = False,
) -> nn.Module:
    """Copy `net` with a [`Parametrized`][funcparam.Parametrized] in the place of each block.

    Rules are those for the whole network. Each block that has a weight with a rule becomes a shell,
    and so does every other module that itself has one. `fully_shard`, checkpoints and
    `torch.compile` can then go block by block, as on any network: each gathers, computes again or
    compiles the maps of one block. Attributes and methods of a block are reached through its shell.

    The keys of `state_dict` are those of the network, with a word where a shell is:
    `blocks.0.raw.NAME`, `blocks.0.state.NAME.KEY`, `blocks.0.net.NAME`. `load_state_dict` takes
    plain checkpoints, and [`checkpoint.read`][funcparam.checkpoint.read] reads what it saves.

    Args:
        net: the network; it stays as it is.
        rules: as for [`parametrize`][funcparam.parametrize].
        block: the type of the blocks, several types, or a test of a name and a module. Of blocks
            inside of blocks the outer ones count.
        generator: as for [`Parametrization.init`][funcparam.Parametrization.init].
        recompute: as for [`Parametrized`][funcparam.Parametrized].

    Returns:
        The copy. [`unshelled`][funcparam.unshelled] is the way back.

    Raises:
        ValueError: no module is a block; a weight with a rule is tied across blocks, or sits in a
            module that contains one; or as for `parametrize` and `Parametrized`.

    Example:
        >>> import torch, funcparam as fp
        >>> from torch import nn
        >>> from funcparam.transforms import Orthogonal
        >>> net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
        >>> model = fp.shells(net, {"*.weight": Orthogonal()}, block=nn.Sequential)
        >>> list(model.state_dict())[:3]
        ['0.net.0.bias', '0.raw.0.weight', '0.state.0.weight.base']
        >>> list(fp.unshelled(model).state_dict()) == list(net.state_dict())
        True
    """
    p = parametrize(net, rules)
    tops = _tops(net, block)
    homes: dict[str, dict[str, Any]] = {}
    for entry in p.entries:
        if entry.transform is None:
            continue
        if entry.transform.takes():
            raise ValueError(
                f"{entry.name!r}: {entry.transform!r} takes the value of another weight, which the"
                " shell of its block may not have. Use one Parametrized"
            )
        found: dict[nn.Module, str] = {}
        for name in entry.names:
            found.setdefault(net.get_submodule(_home(name, tops)), _home(name, tops))
        home, *others = found.values()
        if others:
            raise ValueError(
                f"{entry.name!r} has a rule and is tied across {home!r} and {others[0]!r}, of which"
                " each would have a shell of its own. Use one Parametrized"
            )
        if any(top.startswith(f"{home}." if home else "") and top != home for top in tops):
            raise ValueError(
                f"{entry.name!r} has a rule and sits in a module that contains blocks. Leave it"
                " without a rule, or use one Parametrized"
            )
        own = entry.name.removeprefix(f"{home}.")
        homes.setdefault(home, {})[own] = entry.transform
    memo: dict[int, Any] = {}  # one for all, so that other ties across blocks stay
    for home, own in homes.items():
        module = net.get_submodule(home)
        shell = cast("Any", Parametrized).__new__(Parametrized, module)
        part = parametrize(module, own)
        shell.set_up(module, part, memo, (None, None), generator, recompute=recompute)
        memo[id(module)] = shell
    return deepcopy(net, memo)


def unshelled(net: nn.Module) -> nn.Module:
    """Copy a network with the folded module in the place of each shell: the plain network again.

    Args:
        net: what [`shells`][funcparam.shells] returned, or any module with shells inside.
    """
    memo: dict[int, Any] = {}
    for module in net.modules():
        if isinstance(module, Parametrized):
            memo[id(module)] = module.fold_with(memo)
    return deepcopy(net, memo)


def _tops(net: nn.Module, block: Any) -> list[str]:
    """The names of the outermost blocks."""
    if isinstance(block, (type, tuple)):
        found = [name for name, module in _modules(net) if isinstance(module, block)]
    elif callable(block):
        found = [name for name, module in _modules(net) if block(name, module)]
    else:
        raise TypeError(
            "block: expected a type of modules, several, or a test of a name and a module; got"
            f" {describe(block)}"
        )
    if not found:
        raise ValueError("block: no module of the network is one")
    tops: list[str] = []
    for name in found:
        if not any(name.startswith(f"{top}.") for top in tops):
            tops.append(name)
    return tops


def _modules(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = cast("Iterator[tuple[str, nn.Module]]", net.named_modules(remove_duplicate=False))
    return ((name, module) for name, module in named if name)


def _home(name: str, tops: list[str]) -> str:
    """The block that has this weight, or else its own module."""
    own = name.rpartition(".")[0]
    return next((top for top in tops if name.startswith(f"{top}.")), own)
