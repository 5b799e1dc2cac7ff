"""The documentation keeps its word: its Python runs, its links lead somewhere, and every public name has an entry."""

import importlib
import pkgutil
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest

import cmap_defense
from cmap_defense.backbones import backbone_names
from processes import run_script

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = DOCS.parent / "examples" / "notebooks"  # pages of the site, by docs/notebooks.py
PAGES = sorted(DOCS.rglob("*.md"))
END = "\x1e"
"""What ends the output of a block."""


def python_of(page: Path) -> str:
    """The Python blocks of a page as one script, each line where it stands in the page, and marks between them."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            lines.append(f"print({END!r})" if inside else "")
            inside = line == "```python"
        else:
            lines.append(line if inside else "")
    return "\n".join(["import torch; torch.manual_seed(0)", *lines[1:]])


def outputs_of(page: Path) -> list[str]:
    """What a page says that each of its Python blocks prints; empty where it does not say."""
    block = r"^```python\n(?:.*\n)*?```\n(?:\n```text\n((?:.*\n)*?)```\n)?"
    return re.findall(block, page.read_text(encoding="utf-8"), re.MULTILINE)


def agree(found: str, shown: str) -> bool:
    """Whether two outputs differ by no more than another processor's rounding does."""
    number = re.compile(r"\d+(?:\.\d*)?(?:e[+-]?\d+)?")
    if number.sub("#", found) != number.sub("#", shown):
        return False
    pairs = zip(number.finditer(found), number.finditer(shown), strict=True)
    return all(abs(float(a[0]) - float(b[0])) <= slack(b) for a, b in pairs)


def slack(number: re.Match[str]) -> float:
    """1 for a count of images ("14 of 16"), 0.15 or a tenth for a measured number, 0 for another integer."""
    if re.match(r" of \d", number.string[number.end() :]):
        return 1
    return max(0.15, 0.1 * float(number[0])) if "." in number[0] else 0


def prose_of(page: Path) -> str:
    """A page without its code blocks and inline code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


SCRIPTS = """
index getting-started wrap-a-classifier make-it-faster purify-folders backbones/index gradients attack-libraries
attack-this-defence write-your-own-attack purifiers write-your-own-backbone write-your-own-purifier evaluation
detection abstain adapt certify
"""


@pytest.mark.parametrize("name", SCRIPTS.split())
def test_a_page_runs_as_one_script_and_prints_what_it_shows(name: str, tmp_path: Path) -> None:
    page, script = DOCS / f"{name}.md", tmp_path / "page.py"
    script.write_text(python_of(page), encoding="utf-8")
    printed = run_script(script, cwd=tmp_path).split(f"{END}\n")[:-1]
    shown = outputs_of(page)
    assert any(shown), "no block shows what it prints"
    pairs = list(zip(printed, shown, strict=True))
    assert [found for found, expected in pairs if expected and not agree(found, expected)] == []


def test_outputs_agree_up_to_rounding() -> None:
    assert agree("one 0.52 of tensor([3, 4]), 14 of 16", "one 0.58 of tensor([3, 4]), 13 of 16")
    assert not agree("tensor([3, 4])", "tensor([3, 5])")
    assert not agree("12 of 16", "14 of 16")
    assert not agree("0.52", "0.72")
    assert not agree("one 3", "two 3")


def test_the_readme_shows_the_same_example() -> None:
    home, readme = (path.read_text(encoding="utf-8") for path in (DOCS / "index.md", DOCS.parent / "README.md"))
    example = home[home.index("```python") : home.index("The attacker of this example")]
    assert example.count("```") == 4, "a block of code and one of output"
    assert example in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {link}"
        inside = target.is_relative_to(DOCS) or target.parent == NOTEBOOKS
        assert inside, f"{page.name}: {link} leaves the documentation"
        assert not anchor or anchor in anchors_of(target), f"{page.name}: no heading {link}"


def shown_names() -> dict[str, set[str]]:
    """By module that the API pages show, the names that they show of it."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        blocks = re.split(r"^::: ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        for module, rest in (block.split("\n", 1) for block in blocks):
            members = re.match(r"    options:\n(?:      filters:.*\n)?      members: \[(.+)\]", rest)
            source = Path(str(importlib.import_module(module.strip()).__file__)).read_text(encoding="utf-8")
            defined = re.findall(r"^(?:class |def )?(\w+)(?: = |: |\(|:)", source, flags=re.MULTILINE)
            found.setdefault(module.strip(), set()).update(members[1].split(", ") if members else defined)
    return found


def test_every_name_of_a_public_module_is_in_the_reference() -> None:
    shown, missing = shown_names(), []
    packages = [module.name for module in pkgutil.walk_packages(cmap_defense.__path__, "cmap_defense.")]
    public = [name for name in packages if not name.startswith(("cmap_defense.cli", "cmap_defense.__main__"))]
    for module in map(importlib.import_module, ["cmap_defense", *public]):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            home = str(getattr(value, "__module__", ""))  # a constant has none
            where = [shown.get(home, set())] if home.startswith("cmap_defense") else shown.values()
            found = any(name in names for names in where)
            if isinstance(value, ModuleType):
                found = any(f"{page}.".startswith(f"{value.__name__}.") for page in shown)
            missing += [] if found else [f"{module.__name__}.{name}"]
    assert missing == [], "add them to docs/api, or take them out of __all__"


def test_every_page_is_in_the_navigation_or_linked_from_the_table_of_backbones() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    backbones = (DOCS / "backbones" / "all.md").read_text(encoding="utf-8")
    names = [page.relative_to(DOCS).as_posix() for page in PAGES]
    missing = [name for name in names if name not in navigation and f"({Path(name).name})" not in backbones]
    assert missing == []


def test_cards_of_the_backbones_are_those_of_the_registry() -> None:
    cards = runpy.run_path(str(DOCS / "cards.py"))["cards"]()
    pages = {path.name for path in (DOCS / "backbones").glob("*.md")}
    assert pages == {f"{name}.md" for name in [*backbone_names(), "all", "index"]}
    written = {name: (DOCS / "backbones" / name).read_text(encoding="utf-8") for name in cards}
    assert written == cards, "run python docs/cards.py"
