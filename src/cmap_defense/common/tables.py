"""Tables as text: rows of cells, the first being the heading."""

from __future__ import annotations

from collections.abc import Sequence

Table = Sequence[Sequence[str]]
"""Rows of cells, all of one length; the first row is the heading."""


def table_lines(table: Table) -> list[str]:
    """Aligned columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    head, *rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
    return [head, "  ".join("-" * width for width in widths), *rows]


def markdown_table(table: Table) -> str:
    """A table of Markdown."""
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown_page(title: str, *parts: str) -> str:
    """A title, and paragraphs and tables below it."""
    return "\n\n".join([f"# {title}", *parts]) + "\n"
