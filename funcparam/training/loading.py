"""What an optimizer saved, brought to the tensors of the same names in another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from funcparam.parametrization.names import closest
from funcparam.transforms.contract.signature import describe

_ADVICE = (
    "Load it under the rules and groups that it was saved with, and fp.move from there; or go on"
    " without its moments"
)


class _Trained(NamedTuple):
    """How an optimizer of `fp.groups` trains a tensor."""

    id: Any
    optimizer: str
    kind: str
    shapes: Sequence[Sequence[int]]
    alike: frozenset[str]

    def __str__(self) -> str:
        shapes = " and ".join(str(tuple(shape)) for shape in self.shapes)
        return f"{self.kind} {shapes} by {self.optimizer}"


def matched(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put what was saved into the order of these groups; options that it has not are theirs.

    Raises:
        ValueError: it is of other tensors, or they are trained in another way.
    """
    theirs, ours = _named(_groups_of(saved)), _named(groups)
    for name in [*ours, *theirs]:
        _expect_alike(name, theirs, ours)
    for name in ours:
        _expect_together(name, theirs, ours)
    loaded: list[dict[str, Any]] = []
    for group in groups:
        names = group["names"]
        (own,) = (other for other in saved["param_groups"] if names[0] in other["names"])
        ids = [theirs[name].id for name in names]
        loaded.append({**group, **own, "params": ids, "names": names, "shapes": group["shapes"]})
    return {**saved, "param_groups": loaded}


def _groups_of(saved: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    groups: Sequence[Mapping[str, Any]] = saved.get("param_groups", ())
    if not groups or not all(map(_is_told, groups)):
        raise ValueError(
            "state_dict: expected that of an optimizer of fp.groups, whose groups have names and"
            f" shapes; got {describe(saved)}"
        )
    return groups


def _is_told(group: Mapping[str, Any]) -> bool:
    names, shapes = group.get("names", ()), group.get("shapes", ())
    return 0 < len(names) == len(shapes) == len(group["params"])


def _named(groups: Sequence[Mapping[str, Any]]) -> dict[str, _Trained]:
    found: dict[str, _Trained] = {}
    for group in groups:
        told = (group["optimizer"], group["kind"])
        alike = frozenset(group["names"])
        for name, id, shapes in zip(group["names"], group["params"], group["shapes"], strict=True):
            if name in found:
                raise ValueError(f"state_dict: {name!r} is there twice: leave one of them out")
            found[name] = _Trained(id, *told, [[*shape] for shape in shapes], alike)
    return found


def _expect_alike(name: str, theirs: Mapping[str, _Trained], ours: Mapping[str, _Trained]) -> None:
    if name not in theirs:
        raise ValueError(f"state_dict: missing {name!r}; {closest(name, [*theirs])}. {_ADVICE}")
    if name not in ours:
        raise ValueError(
            f"state_dict: {name!r} is nothing that this optimizer has; {closest(name, [*ours])}."
            f" {_ADVICE}"
        )
    if theirs[name][1:4] != ours[name][1:4]:
        raise ValueError(
            f"state_dict: {name!r} was trained as {theirs[name]}, and is here as {ours[name]}."
            f" {_ADVICE}"
        )


def _expect_together(
    name: str, theirs: Mapping[str, _Trained], ours: Mapping[str, _Trained]
) -> None:
    apart = theirs[name].alike ^ ours[name].alike
    if apart:
        raise ValueError(
            f"state_dict: {name!r} and {min(apart)!r} have one learning rate in only one of the two"
            f" optimizers (lr_scale of fp.groups). {_ADVICE}"
        )
