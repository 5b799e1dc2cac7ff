"""Tables of Markdown, and numbers in words of the field."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def in_255ths(value: float) -> str:
    """A number such as "8/255"; empty where it is no whole number of 255ths between 0 and 1."""
    steps = round(255 * value)
    return f"{steps}/255" if 0 < steps < 255 and abs(255 * value - steps) < 1e-9 else ""
