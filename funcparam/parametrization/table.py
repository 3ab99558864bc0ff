"""Tables: plain text everywhere, and what rich and notebooks show in its place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable


class Tabular:
    """What prints as a table: plain text for `print`, and drawn by `rich.print` and notebooks."""

    @abstractmethod
    def _table(self) -> Table:
        """Lay it out."""

    def __repr__(self) -> str:
        return self._table().text()

    def __rich__(self) -> RichTable:
        return self._table().rich()

    def _repr_html_(self) -> str:
        return self._table().html()


@dataclass(frozen=True, repr=False)
class Table(Tabular):
    """Rows of text under a head; the columns of `right` are flush right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()

    def _table(self) -> Table:
        return self

    def text(self) -> str:
        """Lay it out in columns as wide as they need."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]

        def line(row: Sequence[str]) -> str:
            cells = (
                cell.rjust(width) if i in self.right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            return "  ".join(cells).rstrip()

        return "\n".join(map(line, [self.head, ["-" * width for width in widths], *self.rows]))

    def rich(self) -> RichTable:
        """Draw it for rich, which is imported here: only rich asks for it."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        drawn = RichTable()
        for i, title in enumerate(self.head):
            side = "right" if i in self.right else "left"
            drawn.add_column(title, justify=side, overflow="fold")
        for row in self.rows:
            drawn.add_row(*map(escape, row))
        return drawn

    def html(self) -> str:
        """Draw it for a notebook."""
        from html import escape

        def line(tag: str, row: Iterable[str]) -> str:
            cells = (
                f'<{tag} style="text-align: {"right" if i in self.right else "left"}">'
                f"{escape(cell)}</{tag}>"
                for i, cell in enumerate(row)
            )
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        return f"<table><thead>{line('th', self.head)}</thead><tbody>{body}</tbody></table>"
