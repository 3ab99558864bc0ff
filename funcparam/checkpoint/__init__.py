"""Checkpoints: raw and state from whatever a file holds, and back.

[`explain`][funcparam.checkpoint.explain] says how each tensor of a checkpoint is stored,
[`read`][funcparam.checkpoint.read] takes raw and state from it,
[`write`][funcparam.checkpoint.write] lays them out for one library or another, and
[`convert`][funcparam.checkpoint.convert] does both. [`load`][funcparam.checkpoint.load] and
[`save`][funcparam.checkpoint.save] are for files, which never run code, and which say what they
are: [`parametrization`][funcparam.checkpoint.parametrization].
"""

from funcparam.checkpoint._contents import Contents
from funcparam.checkpoint._explain import Explanation, explain
from funcparam.checkpoint._files import load, save
from funcparam.checkpoint._read import read
from funcparam.checkpoint._spec import description, parametrization
from funcparam.checkpoint._write import Style, convert, write

__all__ = [
    "Contents",
    "Explanation",
    "Style",
    "convert",
    "description",
    "explain",
    "load",
    "parametrization",
    "read",
    "save",
    "write",
]
