"""Run a program with funcparam's parametrizations, as `python` itself would run it."""

import runpy
import sys
from pathlib import Path

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
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *_] if not script.startswith("-"):
            del sys.argv[0]
            sys.path[0] = str(Path(script).resolve().parent)
            install()
            runpy.run_path(script, run_name="__main__")
        case _:
            sys.exit(USAGE)


if __name__ == "__main__":
    main()
