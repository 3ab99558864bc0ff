"""The command line: `python -m funcparam explain | convert | fold | diff`."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from funcparam.checkpoint._contents import Contents
from funcparam.checkpoint._diff import difference
from funcparam.checkpoint._explain import explain
from funcparam.checkpoint._files import load_telling, save, save_shards
from funcparam.checkpoint._flat import tensors_and_others
from funcparam.checkpoint._read import take, warn_of_moves
from funcparam.checkpoint._silent import parametrization_by, transform_of
from funcparam.checkpoint._spec import said
from funcparam.checkpoint._write import Style, rewritten
from funcparam.transforms.contract.signature import describe

Tell = Callable[[str], None]

_HELP = """Says what a checkpoint is, and converts it: files of safetensors and of torch.save, an
index of several, or a folder with one of these. No code from a file is run."""
_CODES = """exit status: 0, done, or no difference; 1, files differ; 2, an error, of which standard
error has one line; nothing was written then"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name, and return its exit status."""
    given = _parser().parse_args(arguments)
    tell = _teller()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            status = int(given.run(given, tell))
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 0
        except (OSError, ValueError, TypeError, ImportError, pickle.UnpicklingError) as error:
            tell("")
            print(f"funcparam: error: {_line(error)}", file=sys.stderr)
            status = 2
    for warning in caught:
        print(f"funcparam: warning: {_line(warning.message)}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m funcparam", description=_HELP, epilog=_CODES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any, Tell], int], text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text, epilog=_CODES)
        own.add_argument("--entry", help="the entry of a training checkpoint to take")
        own.set_defaults(run=run)
        return own

    own = command("explain", _explain, "say how each tensor is stored")
    own.add_argument("file", type=Path)
    for name, run, text in (
        ("convert", _convert, "write a checkpoint under other keys"),
        ("fold", _fold, "write the values, as a plain network has them"),
    ):
        own = command(name, run, text)
        own.add_argument("file", type=Path)
        own.add_argument("out", type=Path, help="a file; of safetensors if it ends so")
        own.add_argument(
            "--shards",
            type=_size,
            metavar="SIZE",
            help="make OUT a folder of files of safetensors of at most this size, as '4GB', with"
            " an index",
        )
        if name == "convert":
            own.add_argument("--to", required=True, choices=get_args(Style), help="whose keys")
        _add_rules(own)
    own = command("diff", _diff, "compare the values of two checkpoints")
    own.add_argument("file", type=Path)
    own.add_argument("other", type=Path)
    own.add_argument("--tolerance", type=float, default=0.0, help="what counts as equal")
    _add_rules(own)
    return parser


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rule",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "TRANSFORM"),
        help="the transform of tensors by a name or glob, where the file does not say it, as"
        " 'encoder.*.weight' 'WeightNorm(dim=2)'; may be given several times",
    )


def _explain(given: Any, tell: Tell) -> int:
    file = _loaded(given.file, tell)
    found = explain(file if given.entry is None else _entry_of(given.file, file, given.entry))
    tell("")
    print(found)
    return 0


def _convert(given: Any, tell: Tell) -> int:
    return _write(given, given.to, tell)


def _fold(given: Any, tell: Tell) -> int:
    return _write(given, "plain", tell)


def _write(given: Any, style: Style, tell: Tell) -> int:
    _expect_room(given.out, given.shards is not None)
    (found,) = _contents([given.file], given, tell)
    if style != "plain" and all(entry.transform is None for entry in found.p.entries):
        raise ValueError(
            f"{str(given.file)!r} holds plain values alone, of which style {style!r} has nothing to"
            " make: no weight in it has a transform. checkpoint.read(file, p) takes raw and state"
            " from it, and checkpoint.write(p, raw, state) lays them out"
        )
    written = rewritten(found, style)
    tell(f"writing {given.out}")
    # beside it, under a name with the same ending: it is there whole or not at all
    unfinished = given.out.with_name(f".unfinished-{os.getpid()}-{given.out.name}")
    try:
        if given.shards is None:
            save(written, unfinished)
        else:
            unfinished.mkdir()
            save_shards(written, unfinished, given.shards)
        unfinished.replace(given.out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)
    tell("")
    return 0


def _expect_room(out: Path, in_shards: bool) -> None:  # noqa: FBT001
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{str(out.parent)!r}: no such folder")
    if in_shards and out.exists():
        raise FileExistsError(f"{str(out)!r}: expected a folder to make; it is there already")
    if not in_shards and out.is_dir():
        raise IsADirectoryError(f"{str(out)!r}: expected a file to write; got a folder")


def _size(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d*)?) *(?:([KMGT]?)B)?", text, re.IGNORECASE)
    size = float(found[1]) * 1000 ** " KMGT".index((found[2] or " ").upper()) if found else 0.0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"expected a size, as '500MB' or '4GB'; got {text!r}")
    return size


def _diff(given: Any, tell: Tell) -> int:
    both = _contents([given.file, given.other], given, tell)
    first, second = (rewritten(contents, "plain") for contents in both)
    found = difference(first, second, tolerance=given.tolerance)
    tell("")
    if found.rows:
        print(found)
    return int(bool(found.rows))


def _contents(paths: Sequence[Path], given: Any, tell: Tell) -> list[Contents]:
    """What files hold, by the transforms that they say, or by their keys and the rules."""
    rules = [(selector, transform_of(call)) for selector, call in given.rule]
    files = [_loaded(path, tell) for path in paths]
    if given.entry is not None:
        in_one = any(given.entry in file for file in files)  # the other one may be plain
        files = [
            file if in_one and given.entry not in file else _entry_of(path, file, given.entry)
            for path, file in zip(paths, files, strict=True)
        ]
    found: list[Contents] = []
    used = False
    for path, file in zip(paths, map(_raw_and_state, files), strict=True):
        try:
            own = None if said(file) else parametrization_by(tensors_and_others(file)[0], rules)
            used |= own is not None
            found.append(take(file, own))
            warn_of_moves(found[-1], stacklevel=1)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(path)!r}: {error}") from error
    if rules and not used:
        raise ValueError(f"{str(paths[0])!r} says its transforms itself: leave --rule out")
    return found


def _loaded(path: Path, tell: Tell) -> Mapping[str, Any]:
    file: Any = load_telling(path, "cpu", tell)
    if not isinstance(file, Mapping):
        got = describe(file)
        raise TypeError(f"{str(path)!r}: expected a dict of tensors, by key; got {got}")
    return cast("Mapping[str, Any]", file)


def _entry_of(path: Path, file: Mapping[str, Any], entry: str) -> Any:
    if entry not in file:
        raise ValueError(f"{str(path)!r}: no entry {entry!r}; got {list(file)[:8]}")
    if not isinstance(file[entry], Mapping):
        got = describe(file[entry])
        raise TypeError(f"{str(path)!r}: expected a dict of tensors in {entry!r}; got {got}")
    return file[entry]


def _raw_and_state(file: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those alone of a training checkpoint that has them beside other entries."""
    if said(file) or not isinstance(file.get("raw"), Mapping):
        return file
    return {word: file[word] for word in ("raw", "state", "buffers") if word in file}


def _line(message: object) -> str:
    return " ".join(str(message).split())


def _teller() -> Tell:
    """A line on the screen that the next one replaces; nothing where nobody looks on."""
    if not sys.stderr.isatty():
        return lambda _: None
    width = 0

    def tell(text: str) -> None:
        nonlocal width
        print(f"\r{text:{width}}\r{text}", end="", file=sys.stderr, flush=True)
        width = len(text)

    return tell
