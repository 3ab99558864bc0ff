"""Draw the rooms of the package, and who imports whom, as the code has it.

    python -m tests.rooms docs/rooms.svg

An arrow that others imply is left out: who imports a room may import what that room does.
"""

import ast
import html
import sys
from pathlib import Path
from statistics import fmean
from textwrap import wrap

import funcparam

ROOT = Path(funcparam.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = {
    module: folder / "__init__.py"
    for folder in sorted({path.parent for path in FILES} - {ROOT})
    if (module := ".".join(folder.relative_to(ROOT).parts))
}


def imports(path):
    """The (module, name) pairs that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room(module):
    """The room of a module; None for what lies in the package itself, which is the public face."""
    inner = module.removeprefix("funcparam").removeprefix(".")
    inside = [name for name in ROOMS if inner == name or inner.startswith(f"{name}.")]
    return max(inside, key=len, default=None)


def imported():
    """The rooms that each room imports."""
    found = {name: set() for name in ROOMS}
    for path in FILES:
        if own := room(module_of(path)):
            pairs = [pair for pair in imports(path) if pair[0].startswith("funcparam")]
            found[own] |= {room(".".join(pair)) or room(pair[0]) for pair in pairs} - {own, None}
    return found


def direct(found):
    """Without what follows: who imports a room may import what that room does."""
    behind = {}
    for name in sorted(found, key=lambda name: height(name, found)):
        behind[name] = found[name].union(*(behind[other] for other in found[name]))
    return {
        name: own - set().union(*(behind[other] for other in own)) for name, own in found.items()
    }


def height(name, found):
    """The longest way down."""
    return max((1 + height(other, found) for other in found[name]), default=0)


WIDTH, HEIGHT, ACROSS, DOWN = 260, 98, 24, 42


def placed(edges):
    """The middle of the top of each room: below those that import it, and near to them."""
    heights = {name: height(name, edges) for name in edges}
    top = max(heights.values())
    rows = [[name for name in edges if heights[name] == top - i] for i in range(top + 1)]
    middle = max(map(len, rows)) * (WIDTH + ACROSS) / 2
    places = {}
    for y, row in enumerate(rows):
        above = {name: [places[n][0] for n in places if name in edges[n]] for name in row}
        row.sort(key=lambda name: (fmean(above[name] or [0]), name))
        for i, name in enumerate(row):
            x = middle + (i - (len(row) - 1) / 2) * (WIDTH + ACROSS)
            places[name] = x, y * (HEIGHT + DOWN)
    return places


def arrow(name, other, edges, places):
    """From the bottom of a room to the top of another one."""
    left = lambda name: places[name][0]  # noqa: E731
    ends = sorted(edges[name], key=left)
    starts = sorted((start for start in edges if other in edges[start]), key=left)
    (x, y), (to, end) = places[name], places[other]
    x, y = x + _spread(ends.index(other), len(ends)), y + HEIGHT
    to, end = to + _spread(starts.index(name), len(starts)), end - 2
    half = (y + end) / 2
    return f'<path d="M{x:.0f} {y}C{x:.0f} {half:.0f} {to:.0f} {half:.0f} {to:.0f} {end}"/>'


def _spread(i, count):
    return WIDTH / 2 * ((i + 1) / (count + 1) - 0.5)


def frame(x, y):
    return f'<rect x="{x - WIDTH / 2:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'


def words(name, x, y):
    """The name of a room, and the first line of what it says of itself."""
    says = ast.get_docstring(ast.parse(ROOMS[name].read_text(encoding="utf-8"))).splitlines()[0]
    title = name.replace(".", "/")
    yield f'<text x="{x:.0f}" y="{y + 22}" font-size="17" font-weight="600">{title}/</text>'
    for i, line in enumerate(wrap(says.replace("`", ""), 36)):
        yield f'<text x="{x:.0f}" y="{y + 41 + 15 * i}">{html.escape(line)}</text>'


def picture():
    """The SVG."""
    edges = direct(imported())
    places = placed(edges)
    right = max(x for x, _ in places.values()) + WIDTH / 2 + 10
    bottom = max(y for _, y in places.values()) + HEIGHT + 2
    says = "; ".join(f"{n} imports {', '.join(sorted(edges[n]))}" for n in edges if edges[n])
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="2 -2 {right:.0f} {bottom + 2}"'
            ' role="img" aria-labelledby="t" font-family="system-ui, sans-serif" font-size="12">',
            f'<title id="t">{says}.</title>',
            '<marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6"'
            ' orient="auto"><path d="M0 0 10 5 0 10z" fill="#7986cb"/></marker>',
            '<g fill="none" stroke="#7986cb" stroke-width="2">',
            *(frame(*place) for place in places.values()),
            '<g marker-end="url(#a)">',
            *(arrow(name, other, edges, places) for name in edges for other in sorted(edges[name])),
            "</g>",
            "</g>",
            '<g fill="#7986cb" text-anchor="middle">',
            *(line for name, place in places.items() for line in words(name, *place)),
            "</g>",
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
