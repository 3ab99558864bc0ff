"""Other libraries, where they are installed."""

import importlib
import warnings
from importlib.metadata import version

PEERS = "geotorch", "higher", "torchopt", "tensordict"


def peer(name):
    """A package, or None where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def versions():
    return {name: version(name) for name in ("torch", *PEERS) if peer(name)}
