"""Extension of griffe, which reads docstrings for the site: it knows the section `Examples`, and ours is `Example`."""

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the heading, so that an example is laid out as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every object after it is read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
