"""What the keys of a state_dict say about how each tensor was stored."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

_TORCH = re.compile(r"(?P<prefix>.*?)(?<![^.])parametrizations\.(?P<local>[^.]+)\.(?P<part>.+)")

_LEGACY = (
    ("legacy weight_norm", ("_g", "_v")),
    ("legacy spectral_norm", ("_orig", "_u", "_v")),
    ("legacy prune", ("_orig", "_mask")),
)
_BEFORE_TORCH_11 = ("legacy spectral_norm", ("", "_orig", "_u"))

# What a module of funcparam puts before a name. `net_buffers` is in older files, `buffers` in
# those that were saved as {"raw": raw, "state": state, "buffers": buffers}.
_WORD = re.compile(r"(?:(?<=\.)|^)(raw|state|net|net_buffers|buffers)\.")
_AS_THEY_ARE = ("net", "net_buffers", "buffers")


@dataclass(frozen=True)
class Stored:
    """A tensor of a network, how it is stored, and under which key each part of it.

    Attributes:
        name: its name in the network.
        style: `"plain"`, `"funcparam"`, `"torch"`, `"legacy weight_norm"`, `"legacy
            spectral_norm"` or `"legacy prune"`.
        keys: pairs of part and key.
    """

    name: str
    style: str
    keys: tuple[tuple[str, str], ...]
    head: str = ""
    """The name of the module that has the words `raw`, `state` and `net`, with its dot."""

    @property
    def is_plain(self) -> bool:
        """Whether it is stored as its value."""
        return self.style == "plain" or self.keys[0][0] == "net"

    def key(self, part: str) -> str:
        """The key of a part."""
        return key_of(self.name, self.style, part, self.head)


def key_of(name: str, style: str, part: str, head: str = "") -> str:
    """The key under which a part of a tensor is stored."""
    if style == "funcparam":
        word, dot, inner = part.partition(".")
        return f"{head}{word}.{name.removeprefix(head)}{dot}{inner}"
    if style == "torch":
        prefix, dot, local = name.rpartition(".")
        return f"{prefix}{dot}parametrizations.{local}.{part}"
    return f"{name}{part}"


def scan(
    keys: Collection[str], names: Collection[str] = (), buffers: Collection[str] = ()
) -> list[Stored]:
    """Group keys by the tensor that they store, funcparam's own keys apart.

    A key that is among the names that the network has is that plain tensor; nothing else can be a
    part of a tensor whose plain key is there.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key in keys:
        name, style, part = _place(key, keys, names, buffers)
        found.setdefault((name, style), {})[part] = key
    return [Stored(name, style, tuple(parts.items())) for (name, style), parts in found.items()]


def _place(
    key: str, keys: Collection[str], names: Collection[str], buffers: Collection[str]
) -> tuple[str, str, str]:
    """The name, style and part that a key stands for."""
    if key in buffers or key.endswith("_extra_state"):
        return key, "plain", ""
    if key not in names and (match := _TORCH.fullmatch(key)):
        return match["prefix"] + match["local"], "torch", match["part"]
    for style, endings in (_BEFORE_TORCH_11, *_LEGACY):
        for ending in endings:
            name = key.removesuffix(ending)
            parts = {name + other for other in endings if other}
            if (
                name + ending == key
                and name.rpartition(".")[2]
                and (name in keys) == ("" in endings)
                and not (name + "_v" in keys and "" in endings)
                and all(o in keys and o not in names and o not in buffers for o in parts)
            ):
                return name, style, ending
    return key, "plain", ""


def half_legacy(key: str, names: Collection[str]) -> str | None:
    """The name of which `key` looks like a legacy part."""
    endings = [ending for _, endings in _LEGACY for ending in endings]
    return next((key.removesuffix(e) for e in endings if key.removesuffix(e) in names), None)


def scan_own(keys: Collection[str], names: Collection[str]) -> list[Stored]:
    """Group funcparam's own keys by the tensor, one of `names`, that they store.

    `raw.NAME`, `raw.NAME.KEY` and `state.NAME.KEY`; what has no rule is at `raw.NAME` or, in a
    module, at `net.NAME`. In a bigger network the words follow the name of the module.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key in keys:
        for head, word, rest in splits(key):
            if word not in ("raw", "state", "net"):
                continue
            name, inner = _longest(head, rest, names)
            if name and (inner == "" or word != "net"):
                part = f"{word}.{inner}" if inner else word
                found.setdefault((name, head), {})[part] = key
                break
    return [
        Stored(name, "funcparam", tuple(parts.items()), head)
        for (name, head), parts in found.items()
    ]


def splits(key: str) -> Iterator[tuple[str, str, str]]:
    """Where one of funcparam's words stands in a key: (what is before, the word, the rest)."""
    for match in _WORD.finditer(key):
        yield key[: match.start()], match[1], key[match.end() :]


def _longest(head: str, rest: str, names: Collection[str]) -> tuple[str, str]:
    """The longest of `names` that begins `head + rest`, and what is left of it."""
    at = len(rest)
    while at > 0:
        if head + rest[:at] in names:
            return head + rest[:at], rest[at + 1 :]
        at = rest.rfind(".", 0, at)
    return "", ""


def as_in_the_network(key: str, heads: Collection[str]) -> str:
    """The name in the network of what funcparam's modules keep as it is."""
    for head, word, rest in splits(key):
        if head in heads and word in _AS_THEY_ARE:
            return head + rest
    return key


def heads_of(keys: Collection[str]) -> set[str]:
    """The modules of which every key has one of funcparam's words, judged by the keys alone."""
    below: dict[str, set[str]] = {"": set()}
    for key in keys:
        parts = key.split(".")
        for i, part in enumerate(parts):
            head = ".".join(parts[:i]) + "." * bool(i)
            below.setdefault(head, set()).add(part)
    words = {"raw", "state", *_AS_THEY_ARE}
    return {head for head, first in below.items() if first <= words and "raw" in first}
