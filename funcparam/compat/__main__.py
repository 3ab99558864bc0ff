"""Run a program with funcparam's parametrizations, as `python` itself would run it."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from funcparam.compat import install

USAGE = """\
usage: python -m funcparam.compat script.py [argument ...]
       python -m funcparam.compat -m module [argument ...]

Runs the program after funcparam.compat.install()."""


def main() -> None:
    """Run the script or the module that the command line names, with the arguments after it."""
    match sys.argv[1:]:
        case ["-h" | "--help", *_]:
            print(USAGE)
        case ["-m", module, *arguments]:
            sys.argv = [module, *arguments]  # runpy puts the module's file in the name's place
            install()
            if not _is_there(module):
                _fail(f"no module named {module!r}")
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *_] if not script.startswith("-"):
            if not Path(script).exists():
                _fail(f"{script!r}: no such file")
            del sys.argv[0]
            sys.path[0] = str(Path(script).resolve().parent)
            install()
            runpy.run_path(script, run_name="__main__")
        case _:
            sys.exit(USAGE)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError as error:  # a package that it would be in, or what that imports
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return False


def _fail(message: str) -> NoReturn:
    print(f"funcparam.compat: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
