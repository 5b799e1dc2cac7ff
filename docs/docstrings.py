"""Used while the API pages are built: turns the habits of our docstrings into Markdown.

A role such as ``:class:`~cmap_defense.results.History``` becomes a link to that entry, ``:meth:`forward``` becomes
code,
``::`` before an indented block goes away, and a paragraph of fields (``name: text. other: text.``) becomes a list.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["PlainMarkdown", "to_markdown"]

_ROLE = re.compile(r":(?:class|data|func|meth|mod|attr|exc):`(~?)([\w.]+)`")
_NAMES = r"[a-z]\w*(?:, [a-z]\w*)*"
_FIELD = re.compile(rf"(?:^|(?<=\. )){_NAMES}: ")


class PlainMarkdown(Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """The docstring ``text`` as Markdown with Google sections."""
    text = _ROLE.sub(_link, text)
    text = re.sub(r"^Raises:\n\s+(As [^\n]*)$", r"Raises: \1", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*::$", "", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return "\n\n".join(_listed(paragraph) for paragraph in text.split("\n\n"))


def _listed(paragraph: str) -> str:
    """A paragraph of fields as a list; any other as it is."""
    if not re.match(rf"{_NAMES}: ", paragraph):
        return paragraph
    flat = re.sub(r"\s*\n\s*", " ", paragraph)
    starts = [match.start() for match in _FIELD.finditer(flat)]
    parts = [flat[a:b].strip() for a, b in zip(starts, [*starts[1:], len(flat)], strict=True)]
    return "\n".join("- " + re.sub(rf"^({_NAMES}): ", _code, part) for part in parts)


def _code(match: re.Match[str]) -> str:
    return ", ".join(f"`{name}`" for name in match[1].split(", ")) + ": "


def _link(match: re.Match[str]) -> str:
    short, target = match.groups()
    shown = target.rpartition(".")[2] if short else target
    return f"[`{shown}`][{target}]" if target.startswith("cmap_defense.") else f"`{shown}`"
