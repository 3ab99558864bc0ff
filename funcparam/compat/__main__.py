"""Run a script with funcparam's parametrizations: `python -m funcparam.compat script.py ARGS`."""

import runpy
import sys
from pathlib import Path

from funcparam.compat import install


def main() -> None:
    """Run the script that the command line names, with the arguments after it."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m funcparam.compat script.py [argument ...]")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
