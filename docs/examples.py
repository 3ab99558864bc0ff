"""An extension of griffe that reads the docstrings as they are meant."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Sections of examples, and references from a class to its own members."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename `Example:`, which would be a note in running text, where a doctest is unreadable.

        In the docstring of a class, `[..name]` is a member of the class, as in its methods.
        """
        if obj.docstring is None:
            return
        text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = text.replace("][..", "][.") if obj.is_class else text
