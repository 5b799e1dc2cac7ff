"""The notebooks run from the top, on small settings, and the site shows them as they are."""

import ast
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

TINY: dict[str, dict[str, Any]] = {
    "1-wrap-attack-inspect": {"count": 3, "held_out": 2, "steps": 2, "iterations": 2},
    "2-measure-robustness": {"count": 2, "steps": 1, "eot": 1, "repeats": 2, "sanity": 1},
    "3-compare-purifiers": {"count": 2, "steps": 1, "eot": 1, "predictions": 1, "k": 1},
    "4-make-it-faster": {"count": 2, "many": 2, "versions": 2, "iterations": 2, "compiled": False},
    "5-train-a-backbone": {"digits": 200, "images": 256, "count": 4},
    "6-certify": {"count": 2, "samples": 10},
    "7-your-own": {"count": 2, "steps": 1, "repeats": 1},
}
"""What the first cell of each notebook sets, for the test."""


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> None:
    """Run a cell, and show the value of its last line as a notebook would."""
    *body, last = ast.parse(source).body
    shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module(body if shown else [*body, last], []), "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        for method in ("_repr_png_", "_repr_html_", "_repr_markdown_"):
            getattr(value, method, str)()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_the_top(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    plots.switch_backend("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        first, *cells = code_of(path)
        exec(first, names)
        assert {name for name in names if not name.startswith("__")} == TINY[path.stem].keys()
        names |= TINY[path.stem]
        for cell in cells:
            run(cell, names)
    finally:
        plots.close("all")


def test_there_is_a_notebook_for_each_size() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(TINY)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_run(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run python examples/run_notebooks.py"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size <= 300_000
    lines = [line for source in code_of(path) for line in source.splitlines()]
    assert [line for line in lines if len(line) > 80] == []


HOOK = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_has_its_code_pictures_and_links(path: Path) -> None:
    text, pictures = HOOK["page_of"](path)
    assert all(source in text for source in code_of(path))
    assert pictures
    assert all(name in text and content.startswith(b"\x89PNG") for name, content in pictures.items())
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if ":" not in link and link not in pictures]
    for link in links:
        found = ROOT / "docs" / link[3:] if link.startswith("../") else path.parent / link.replace(".md", ".ipynb")
        assert found.is_file(), link


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("../examples/notebooks/6-certify.ipynb", "tutorials/6-certify.md"),
        ("../../examples/notebooks/6-certify.ipynb", "../tutorials/6-certify.md"),
    ],
)
def test_links_to_notebooks_lead_to_their_pages(link: str, expected: str) -> None:
    assert HOOK["on_page_markdown"](f"[x]({link})", page=None) == f"[x]({expected})"
