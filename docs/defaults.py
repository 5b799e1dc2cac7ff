"""Extension of griffe: a field ``setting(10, "What it is.", minimum=1)`` has the default 10 in the reference."""

from __future__ import annotations

from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Show the first argument of ``setting`` as the default."""

    def on_attribute_instance(
        self, *, attr: griffe.Attribute, **_: Any
    ) -> None:
        """Replace the call."""
        call = attr.value
        if not isinstance(call, griffe.ExprCall):
            return
        if str(call.function) == "setting" and call.arguments:
            first = call.arguments[0]
            named = isinstance(first, griffe.ExprKeyword)
            attr.value = None if named else first
