"""Raw and state from a checkpoint in any spelling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from funcparam.checkpoint._contents import Contents, cast_to_specs, copied
from funcparam.checkpoint._flat import expect_tensors, tensors_and_others
from funcparam.checkpoint._keys import Stored
from funcparam.checkpoint._locate import locate
from funcparam.checkpoint._spec import AsJson, Known, Said, parametrization, said
from funcparam.checkpoint._wrappers import View, bare_name, view
from funcparam.parametrization.boundary import (
    Entry,
    are_equal,
    check_raw_tree,
    check_state_tree,
    distance_moved,
    expect_finite,
)
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.values import said_moves
from funcparam.transforms._spellings import Spelling, infer, spellings
from funcparam.transforms.contract.base import State
from funcparam.transforms.contract.signature import TensorSpec, describe

Tree: TypeAlias = tuple[dict[str, Any], dict[str, State]]
"""Raw and state."""


def read(
    state_dict: Mapping[str, Any],
    p: Parametrization[Any] | None = None,
    *,
    buffers: Collection[str] = (),
    strict: bool = True,
    known: Known | None = None,
    generator: torch.Generator | None = None,
) -> Contents:
    """Take raw and state from a checkpoint, however each tensor in it is stored.

    A tensor that is stored as its transform keeps it, here or in PyTorch, is taken over exactly:
    weight norm, for one, as `raw.weight.magnitude`, as `parametrizations.weight.original0` or as
    `weight_g`. A plain or folded tensor goes through the right inverse. So does one that another
    transform wrote, by the value that it stands for, where the file says which one it was or the
    keys and numbers leave no doubt.

    What DataParallel, DDP, FSDP, `torch.compile`, AveragedModel, Lightning and DeepSpeed put
    before or into names is left out, and the state_dict inside a training checkpoint is found.

    Args:
        state_dict: tensors by key; nested dictionaries, as `{"raw": raw, "state": state}`, too.
        p: the parametrization to read for; None for the one that wrote the file, where the file
            says which one it was. Of tied names any may be there.
        buffers: names that the network has beside those of `p`, which are then nothing else.
        strict: whether every name of `p` has to be there. If not, `missing` has those that are not;
            a weight that is there has to be whole.
        known: as for [`parametrization`][funcparam.checkpoint.parametrization].
        generator: as for [`Parametrization.init`][funcparam.Parametrization.init].

    Returns:
        The [`Contents`][funcparam.checkpoint.Contents], copied, in the dtypes of `p`:
        `raw, state, others = read(...)`. `others` is what `p` does not hold: the network's
        buffers, which `net.load_state_dict(others, strict=False)` takes. What else the file has
        is there too; `load_state_dict` returns it as `unexpected_keys`.

    Raises:
        TypeError: something in `state_dict` is not a tensor.
        ValueError: a tensor is missing, incomplete, there twice, or of another shape; it was
            stored for another transform than that of `p`, and its value is not known; or names
            are there at more than one place.

    Warns:
        UserWarning: a value in the file does not satisfy its constraint and was projected.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> old = {"weight_g": torch.tensor([[2.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> p = fp.parametrize({"weight": torch.zeros(1, 2)}, {"weight": WeightNorm()})
        >>> raw, state, _ = fp.checkpoint.read(old, p)
        >>> p(raw)["weight"]
        tensor([[1.2000, 1.6000]])
    """
    contents = take(state_dict, p, buffers=buffers, strict=strict, known=known, generator=generator)
    warn_of_moves(contents, stacklevel=3)
    return cast_to_specs(contents)


def take(
    state_dict: Mapping[str, Any],
    p: Parametrization[Any] | None = None,
    *,
    buffers: Collection[str] = (),
    strict: bool = True,
    known: Known | None = None,
    generator: torch.Generator | None = None,
    beside: Callable[[], Tree] | None = None,
) -> Contents:
    """Do what [`read`][funcparam.checkpoint.read] does, silently and as precise as the file.

    For a module, which may have another precision than `p` was made for, and which has raw and
    state of what is not in the file: `beside` is asked for them.
    """
    tensors, foreign = tensors_and_others(state_dict)
    if p is None:
        p = parametrization(state_dict, known=known)
    if not isinstance(p, Parametrization):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"p: expected a parametrization, in read(state_dict, p); got {describe(p)}")
    seen = view(list(tensors), p.entries, list(buffers))
    if seen.place is None:
        expect_tensors(foreign)
    there = locate(seen.keys, seen.entries, seen.buffers, strict=strict)
    told = _as_seen(said(state_dict), seen)
    reader = _Reader(tensors, seen, told, known or {}, generator)
    raw: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for entry, found in there.entries:
        own, extra = reader.read(entry, found)
        name = seen.names[entry.name]
        raw[name] = own
        if extra:
            state[name] = extra
    missing = tuple(seen.names[name] for name in there.missing)
    state = _settled(p, (raw, state), reader.inverted, beside)
    _check(p, raw, state, missing)
    others = {
        seen.names.get(name, name): (seen.keys[key], tensors[seen.keys[key]])
        for name, key in there.others.items()
    }
    return Contents(
        copied(raw),
        copied(state),
        copied({name: tensor for name, (_, tensor) in others.items()}),
        p,
        missing,
        reader.moved,
        {name: key for name, (key, _) in others.items()},
    )


def _settled(
    p: Parametrization[Any], found: Tree, inverted: Set[str], beside: Callable[[], Tree] | None
) -> dict[str, State]:
    """The state of what was inverted, which knew its own value alone and not those it takes."""
    takes = {name: p[name].takes().values() for name in inverted}
    if not any(takes.values()):
        return found[1]
    raw, state = found
    if beside is not None:
        others = beside()
        raw, state = {**others[0], **raw}, {**others[1], **state}
    for name, taken in takes.items():
        if absent := [other for other in taken if other not in raw]:
            raise ValueError(
                f"{name!r} is stored as its value, and {p[name]!r} takes that of {absent[0]!r},"
                " which is not there: read both"
            )
    others = {name for name in raw if not (name in p and p[name].takes())}
    part = p._part(inverted | others, ())  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        new = part._plan.settled(part.of(raw), part.of(state), inverted)  # pyright: ignore
    return {name: new.get(name, own) for name, own in found[1].items()}


def _as_seen(told: Mapping[str, Said], seen: View) -> dict[str, Said]:
    """What the file says, under the names of the view."""
    if seen.place is None:
        return dict(told)
    return {bare_name(name).removeprefix(seen.place): one for name, one in told.items()}


def _check(p: Parametrization[Any], raw: Any, state: Any, missing: Collection[str]) -> None:
    entries = [entry for entry in p.entries if entry.name not in missing]
    check_raw_tree(entries, raw)
    check_state_tree(entries, state)


def warn_of_moves(contents: Contents, prefix: str = "", *, stacklevel: int) -> None:
    """Say which values were projected; the prefix is what they are in."""
    if contents.moved:
        warnings.warn(
            "values of the file do not satisfy their constraints and were projected:"
            f" {said_moves(contents.p, contents.moved, prefix)}",
            stacklevel=stacklevel,
        )


@dataclass
class _Reader:
    """Raw and state of one entry after the other, of one file."""

    tensors: Mapping[str, Any]
    view: View
    said: Mapping[str, Said]
    known: Known
    generator: torch.Generator | None
    moved: dict[str, float] = field(default_factory=dict[str, float])
    spelt: AsJson = field(default_factory=AsJson)
    inverted: set[str] = field(default_factory=set[str])

    def read(self, entry: Entry, found: Sequence[Stored]) -> tuple[Any, State]:
        """Read the first of what is stored under the names of a tie; the rest has to be equal."""
        first = self._parts(found[0])
        if entry.transform is not None or len(first) > 1:
            _expect_dense_on_one_device(found[0], first)
        for other in found[1:]:
            _expect_same(found[0], first, other, self._parts(other))
        kind = entry.signature.value.dtype
        parts = {part: _at_least(tensor, kind) for part, tensor in first.items()}
        told = next((self.said[name] for name in entry.names if name in self.said), None)
        return self._read(entry, found[0], parts, told)

    def _read(
        self, entry: Entry, item: Stored, parts: Mapping[str, Tensor], told: Said | None
    ) -> tuple[Any, State]:
        """Exactly where the transform itself wrote it, else by the value."""
        if item.is_plain:
            return self._inverted(entry, item, next(iter(parts.values())))
        writer = self._writer(entry, told)
        if writer.transform is None and set(parts) == {"raw"}:
            if told is None and self._may_have_had_one(item):
                raise ValueError(_no_value(entry, item))
            return self._inverted(entry, item, parts["raw"])
        spelling = _spelling(writer, item.style, parts.keys())
        fitted = _fitted(spelling, writer, parts) if spelling else None
        try:
            if spelling and fitted and not spelling.contradicted(fitted):
                raw, state = spelling.read(fitted)
                if writer is entry:
                    return raw, state
                return self._inverted(entry, item, _value(writer, raw, state))
            inferred = infer(item.style, parts)
        except ValueError as error:
            raise ValueError(f"{self._own(item.name)!r}: {error}") from error
        if inferred is None:
            _expect_complete(writer, item, parts)
            _expect_specs(spelling, writer, item, parts)
            raise ValueError(_no_value(writer, item))
        with torch.no_grad():
            value = inferred.transform.forward(inferred.raw, inferred.state)
        return self._inverted(entry, item, value)

    def _may_have_had_one(self, item: Stored) -> bool:
        """Whether raw without a rule may be that of a transform: a module has such as `net.NAME`.

        Or nothing here has a rule, and one who writes raw has.
        """
        if all(entry.transform is None for entry in self.view.entries):
            return True
        return any(key.startswith(f"{item.head}net.") for key in self.view.keys)

    def _writer(self, entry: Entry, told: Said | None) -> Entry:
        """The entry that wrote what is stored: this very one, where the file says no other."""
        if told is None or told.transform == self.spelt[entry.transform]:
            return entry
        writer = told.entry(self.known)  # an argument may be newer than the file: it has a default
        return entry if writer.transform == entry.transform else writer

    def _inverted(self, entry: Entry, item: Stored, value: Tensor) -> tuple[Any, State]:
        name, spec = self._own(item.name), entry.signature.value
        fitted = _fit(spec, value)
        if fitted is None:
            raise ValueError(f"{item.keys[0][1]!r}: expected {spec}; got {TensorSpec.of(value)}")
        if entry.transform is None:
            return fitted, {}
        expect_finite(name, fitted)
        try:
            raw, state = entry.transform.right_inverse(fitted, generator=self.generator)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{name!r} is stored as its value, but {error}") from error
        self.inverted.add(self.view.names[entry.name])
        stored = self.tensors[self.view.keys[item.keys[0][1]]]
        by = distance_moved(fitted, _value(entry, raw, state), stored.dtype)
        if by:
            self.moved[self.view.names[entry.name]] = by
        return raw, state

    def _parts(self, item: Stored) -> dict[str, Tensor]:
        return {part: self.tensors[self.view.keys[key]] for part, key in item.keys}

    def _own(self, name: str) -> str:
        return self.view.names.get(name, name)


def _value(entry: Entry, raw: Any, state: State) -> Tensor:
    with torch.no_grad():
        return raw if entry.transform is None else entry.transform.forward(raw, state)


def _spelling(entry: Entry, style: str, parts: Set[str]) -> Spelling | None:
    """How the transform of an entry is spelt in these parts, if it is."""
    for spelling in spellings(entry.transform, entry.signature):
        if spelling.style == style and spelling.parts == parts:
            return spelling
    return None


def _fitted(
    spelling: Spelling, entry: Entry, parts: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    specs = spelling.specs(entry.signature)
    fitted = {part: _fit(spec, parts[part]) for part, spec in specs.items()}
    if any(tensor is None for tensor in fitted.values()):
        return None
    return cast("dict[str, Tensor]", fitted)


def _fit(spec: TensorSpec, tensor: Tensor) -> Tensor | None:
    """The tensor in the shape of `spec`; scalars had one dimension before PyTorch 0.4."""
    if tensor.numel() == 1 == math.prod(spec.shape) and (tensor.ndim < 2 or not spec.shape):
        tensor = tensor.reshape(spec.shape)
    return tensor if spec.admits(tensor) else None


def _at_least(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a precision no lower than that of `dtype`."""
    if tensor.is_complex() != dtype.is_complex or not _is_inexact(tensor.dtype, dtype):
        return tensor
    lower = torch.finfo(tensor.dtype).bits < torch.finfo(dtype).bits
    return tensor.to(dtype) if lower else tensor


def _is_inexact(*dtypes: torch.dtype) -> bool:
    return all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _expect_complete(entry: Entry, item: Stored, parts: Mapping[str, Tensor]) -> None:
    for spelling in spellings(entry.transform, entry.signature):
        if spelling.style == item.style and spelling.parts > parts.keys():
            absent = item.key(min(spelling.parts - parts.keys()))
            raise ValueError(f"{item.name!r}: missing {absent!r}, which {entry.transform!r} needs")


def _expect_specs(
    spelling: Spelling | None, entry: Entry, item: Stored, parts: Mapping[str, Tensor]
) -> None:
    for part, spec in (spelling.specs(entry.signature) if spelling else {}).items():
        if _fit(spec, parts[part]) is None:
            got = TensorSpec.of(parts[part])
            raise ValueError(f"{item.key(part)!r}: expected {spec}; got {got}")


def _expect_same(
    first: Stored, mine: Mapping[str, Tensor], other: Stored, theirs: Mapping[str, Tensor]
) -> None:
    """Raise unless two names of a tie have the same tensors."""
    if mine.keys() != theirs.keys() or not all(are_equal(mine[p], theirs[p]) for p in mine):
        raise ValueError(
            f"{first.name!r} and {other.name!r} are tied in the parametrization; got two different"
            " tensors"
        )


def _expect_dense_on_one_device(item: Stored, parts: Mapping[str, Tensor]) -> None:
    for part, tensor in parts.items():
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"{item.key(part)!r}: expected a dense tensor; got {tensor.layout}: give it"
                " tensor.to_dense()"
            )
    devices = {str(tensor.device): item.key(part) for part, tensor in parts.items()}
    if len(devices) > 1:
        got = ", ".join(f"{key!r} on {device}" for device, key in devices.items())
        raise ValueError(f"{item.name!r}: expected its tensors on one device; got {got}")


def _no_value(entry: Entry, item: Stored) -> str:
    keys = [key for _, key in item.keys]
    text = f"{item.name!r} is stored as {keys}, which does not say its value."
    expected = [s for s in spellings(entry.transform, entry.signature) if s.style == item.style]
    if expected:
        wanted = [item.key(part) for part in sorted(expected[0].parts)]
        return f"{text} {entry.transform!r} expects {wanted}"
    return f"{text} Give it the transform that it was saved with, and fold; it has" + (
        f" {entry.transform!r}" if entry.transform else " none"
    )
