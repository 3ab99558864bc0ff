"""Plain-text tables of parametrizations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from funcparam._batching import Group
from funcparam._boundary import Entry, RawTree, StateTree
from funcparam.transforms._signature import NamedSpecs, TensorSpec


def overview(entries: Sequence[Entry]) -> str:
    """What is parametrized by what: one row for each transform."""
    head = ["name", "transform", "value", "raw", "state"]
    rows = [
        [
            _name(entry),
            repr(entry.transform),
            str(entry.signature.value),
            _shapes(entry.signature.raw) or "nothing",
            _shapes(entry.signature.state),
        ]
        for entry in entries
        if entry.transform is not None
    ]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return table(head, rows)


def summary(
    entries: Sequence[Entry], raw: RawTree, state: StateTree, violations: Mapping[str, Tensor]
) -> str:
    """How many numbers are trained and carried, and how far each value is from its constraint."""
    rows = [
        [
            _name(entry),
            repr(entry.transform),
            str(entry.signature.value.shape),
            f"{_count([raw[entry.name]]):,}",
            f"{_count([state.get(entry.name, {})]):,}",
            _number(violations[entry.name]),
        ]
        for entry in entries
        if entry.transform is not None
    ]
    plain = _count(raw[entry.name] for entry in entries if entry.transform is None)
    rows.append(["everything else", "", "", f"{plain:,}", "0", ""])
    rows.append(["total", "", "", f"{_count(raw.values()):,}", f"{_count(state.values()):,}", ""])
    head = ["name", "transform", "value", "trained", "state", "violation"]
    return table(head, rows, right=(3, 4, 5))


def groups(found: Sequence[Group]) -> str:
    """Which leaves are evaluated in one call, and why the others are not."""
    rows = [
        [
            repr(group.transform),
            str(group.entries[0].signature.value),
            str(len(group.entries)),
            f"one by one: {group.obstacle}" if group.obstacle else "in one call",
            _name(group.entries[0]) + (", …" if len(group.entries) > 1 else ""),
        ]
        for group in found
    ]
    return table(["transform", "value", "leaves", "evaluated", "names"], rows, right=(2,))


def _name(entry: Entry) -> str:
    return " = ".join(entry.names)


def _shapes(specs: TensorSpec | NamedSpecs) -> str:
    if isinstance(specs, TensorSpec):
        return str(specs.shape)
    return ", ".join(f"{name}: {spec.shape}" for name, spec in specs)


def _number(scalar: Tensor) -> str:
    return "meta" if scalar.is_meta else f"{scalar.item():.1e}"


def _count(leaves: Iterable[Tensor | Mapping[str, Tensor]]) -> int:
    return sum(
        leaf.numel() if isinstance(leaf, Tensor) else _count(leaf.values()) for leaf in leaves
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lay out rows under a head in columns as wide as they need; `right` ones are flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, [head, ["-" * width for width in widths], *rows]))
