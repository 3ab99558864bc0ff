"""Checkpoints: raw and state from whatever a file holds, and back.

[`explain`][funcparam.checkpoint.explain] says how each tensor of a checkpoint is stored,
[`read`][funcparam.checkpoint.read] takes raw and state from it,
[`write`][funcparam.checkpoint.write] lays them out for one library or another, and
[`convert`][funcparam.checkpoint.convert] does both. [`load`][funcparam.checkpoint.load] and
[`save`][funcparam.checkpoint.save] are for files, which never run code.
"""

from funcparam.checkpoint._codec import Contents, Style, convert, read, write
from funcparam.checkpoint._files import load, save
from funcparam.checkpoint._keys import Explanation, explain

__all__ = [
    "Contents",
    "Explanation",
    "Style",
    "convert",
    "explain",
    "load",
    "read",
    "save",
    "write",
]
