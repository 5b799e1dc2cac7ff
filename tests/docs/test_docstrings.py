"""Docstrings are plain Google style: IDEs, Sphinx and mkdocstrings read them without a plug-in."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "cmap_defense"
MODULES = sorted(SOURCE.rglob("*.py"))
SECTION = re.compile(r" *(Args|Attributes|Returns|Raises|Yields|Warns|Examples?):$")
FIELD = re.compile(r"[a-z_]\w*(, [a-z_]\w*)*: \S")
ROLE = re.compile(r":(class|data|func|meth|mod|attr|exc):`")


def docstrings(text: str) -> Iterator[tuple[str, str]]:
    """The name and docstring of each class and function of a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found = ast.get_docstring(node)
            if found is not None:
                yield node.name, found


def faults(docstring: str) -> list[str]:
    """Lines with a role of Sphinx, a row for several parameters, or a parameter outside of a section."""
    found, section, indent = [], None, 0
    for number, line in enumerate(docstring.splitlines()):
        begin = len(line) - len(line.lstrip())
        if SECTION.match(line):
            section, indent = line.strip(), begin
            continue
        if line.strip() and begin <= indent:
            section = None
        row = FIELD.match(line.strip())
        several = section in ("Args:", "Attributes:") and begin == indent + 4 and row and row[1]
        outside = section is None and row and (number == 0 or not docstring.splitlines()[number - 1].strip())
        if ROLE.search(line) or several or outside:
            found.append(line.strip())
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_docstrings_are_plain_google_style(path: Path) -> None:
    assert {name: lines for name, text in docstrings(path.read_text("utf-8")) if (lines := faults(text))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "Do it.\n\nArgs:\n    first, second: numbers.",
        "Do it.\n\nfirst: a number.",
        "first: a number.",
        "See :func:`other`.",
        "Do it.\n\nArgs:\n    first: a number.\n\nsecond: outside.",
    ],
)
def test_a_private_grammar_is_found(text: str) -> None:
    assert len(faults(text)) == 1
