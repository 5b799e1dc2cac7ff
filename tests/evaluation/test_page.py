"""Markdown and page of a report: the same figures in both, nothing from elsewhere, whatever is missing or how anything
is named."""

from __future__ import annotations

import base64
import copy
import dataclasses
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cmap_defense.errors import MissingExtraError
from cmap_defense.evaluation import Report
from cmap_defense.evaluation.report.page import page
from cmap_defense.evaluation.report.tables import COMPARING, HEADLINE, markdown, sections
from cmap_defense.evaluation.results import ResultsFolder, Timing
from cmap_defense.evaluation.summary import MEASURES
from example_report import TITLES, example_folder, example_report
from patience import HANGS

VOID = ("meta", "link", "img", "br", "wbr", "hr", "input")
SCRIPT = "<script>alert('x')</script>\"'&"


@dataclasses.dataclass
class Element:
    """An element of a page: its name, its attributes, and what it holds, text and elements."""

    name: str
    attributes: dict[str, str | None]
    parts: list[Element | str] = dataclasses.field(default_factory=list)

    def all(self, *names: str) -> Iterator[Element]:
        """It and all elements in it, of these names, in their order."""
        if not names or self.name in names:
            yield self
        for part in self.parts:
            if isinstance(part, Element):
                yield from part.all(*names)

    def one(self, **attributes: str) -> Element:
        (found,) = [e for e in self.all() if all(e.attributes.get(name) == text for name, text in attributes.items())]
        return found

    @property
    def text(self) -> str:
        whole = "".join(part if isinstance(part, str) else part.text for part in self.parts)
        return " ".join(whole.split())

    def rows(self) -> list[list[str]]:
        """The text of a table's cells, its headings among them."""
        return [[cell.text for cell in row.all("td", "th")] for row in self.all("tr")]


class Tree(HTMLParser):
    """A page as elements; every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], self.open[-1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        element = Element(tag, dict(attrs))
        self.open[-1].parts.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def read(text: str) -> Element:
    return Tree(text).root


@pytest.fixture(scope="module")
def report() -> Report:
    return example_report()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, report: Report) -> ResultsFolder:
    return example_folder(tmp_path_factory.mktemp("evaluation"), report)


@pytest.fixture(scope="module")
def small() -> Report:
    """One attack and one baseline, without curves, sweeps and gradients: a page that is quick to make."""
    whole = example_report(attacks=["pgd"], baselines=["other"])
    return dataclasses.replace(whole, curves={}, sweeps=[], gradients=[])


@pytest.fixture(scope="module")
def text(report: Report, folder: ResultsFolder) -> str:
    return page(report, folder)


@pytest.fixture(scope="module")
def tree(text: str) -> Element:
    return read(text)


@pytest.fixture
def nothing(tmp_path: Path) -> ResultsFolder:
    return ResultsFolder(tmp_path / "nothing")


def check_structure(text: str) -> Element:
    """What holds for every page."""
    assert text.startswith('<!doctype html>\n<html lang="en">')
    tree = read(text)
    levels = [int(heading.name[1]) for heading in tree.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert not list(tree.all("script", "iframe", "object", "embed", "audio", "video", "form", "base"))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    for element in tree.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.name, name)
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                assert value is not None
                assert value.startswith(("#", "data:")), (element.name, value[:80])
    for image in tree.all("img"):
        assert (image.attributes["alt"] or "").strip()
    for heading in tree.all("th"):
        assert heading.attributes["scope"] in ("col", "row", "colgroup", "rowgroup")
    for table in tree.all("table"):
        (head,) = table.all("thead")
        assert list(head.all("th"))
        widths = {sum(int(c.attributes.get("colspan") or 1) for c in row.all("td", "th")) for row in table.all("tr")}
        assert len(widths) == 1, table.rows()[0]
    ids = [element.attributes["id"] for element in tree.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in tree.all():
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((element.attributes.get(name) or "").split()) <= set(ids)
        target = element.attributes.get("href")
        if target and target.startswith("#"):
            assert target[1:] in ids
    return tree


def test_structure(report: Report, folder: ResultsFolder, text: str) -> None:
    tree = check_structure(text)
    plots = [image for image in tree.all("img") if "plot" in (image.attributes.get("class") or "")]
    assert len(plots) == 1 + 2 + 1 + 7
    assert len(list(tree.all("img"))) == len(plots) + 6 * 8
    assert page(report, folder) == text


def test_the_order_of_things(report: Report, tree: Element) -> None:
    titles = [section.title for section in sections(report)]
    assert titles == [
        "Headline",
        "What was evaluated",
        "Accuracy under each attack",
        "The worst attack on each image",
        "Success during the search",
        "Checks of the attacks",
        "Accuracy over the size of an attack",
        "Accuracy over the steps of an attack",
        "What averaging does to the gradient",
        "Cost",
        "Settings of the attacks",
        "What may be compared with this",
    ]
    shown = [heading.text for heading in tree.all("h2")]
    assert [title for title in shown if title in titles] == titles
    assert {"Along the iterations of the purification", "Images"} <= set(shown)
    assert [line[3:] for line in markdown(report).splitlines() if line.startswith("## ")] == titles


def test_markdown_and_page_have_the_same_tables(report: Report, tree: Element) -> None:
    text = markdown(report)
    for section in sections(report):
        if not section.table:
            continue
        own = tree.one(id=section.id)
        (table,) = [found for found in own.all("table") if "sheet" not in (found.attributes.get("class") or "")]
        expected = [[" ".join(cell.split()) for cell in row] for row in section.table]
        assert table.rows() == expected
        for row in section.table:
            assert "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" in text
    assert all(point in text for point in COMPARING)


def rows_of(report: Report, name: str) -> list[Any]:
    return next(list(section.table[1:]) for section in sections(report) if section.id == name)


@pytest.mark.parametrize(
    ("single", "said"), [("pgd", "pgd alone leaves less, "), ("clean", "the clean images have less, ")]
)
def test_a_headline_of_one_attack_says_so(small: Report, single: str, said: str) -> None:
    assert small.headline is not None
    found = dataclasses.replace(small.headline, single=single, by_image=small.headline.clean)
    text = markdown(dataclasses.replace(small, headline=found))
    assert f"others it is {found.clean}; {said}{found.accuracy}, and that is the headline" in text


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_every_accuracy_from_the_strongest_attack_down(seeds: tuple[int, ...]) -> None:
    report = example_report(seeds=seeds)
    shown = rows_of(report, "accuracy")
    own = [row for row in report.rows if row.model == "defended"]
    attacks = sorted(own[1:], key=lambda row: row.reevaluated.value)
    expected = [own[0], *attacks, *(row for row in report.rows if row.model != "defended")]
    assert len(shown) == len(expected) == len(report.rows)
    for row, cells in zip(expected, shown, strict=True):
        assert cells[1] == ("clean images" if row.attack == "clean" else row.attack)
        for name, cell in zip(MEASURES, cells[2:7], strict=True):
            spread = f" ({row.spread[name]:.3f})" if len(seeds) > 1 else ""
            assert cell == f"{getattr(row, name)}{spread}"
        assert cells[7] == f"{row.prediction_spread:.3f}"
        assert cells[8] == ("" if row.one_latent is None else f"{row.one_latent:.3f}")


def test_searches_worst_attacks_checks_sweeps_gradients_and_costs() -> None:
    report = example_report(failed=TITLES[:1], unchecked=TITLES[1:2])
    searched = {f"{row.model}/{row.attack}": row for row in report.rows if row.search is not None}
    for name, *cells in rows_of(report, "search"):
        row = searched.pop(name)
        assert cells == [str(row.search_predictions), str(row.search), str(row.search_on_clean)]
    assert not searched
    words = {True: "✓ passed", False: "✗ failed", None: "– not checked"}
    assert rows_of(report, "checks") == [[words[check.passed], check.name, check.found] for check in report.checks]
    assert "7 passed, 1 failed, 1 could not be checked" in markdown(report)
    for sweep in report.sweeps:
        points = zip(sweep.values, sweep.accuracies, sweep.errors, strict=True)
        assert rows_of(report, sweep.name) == [[f"{v:g}", f"{share:.3f} ± {error:.3f}"] for v, share, error in points]
    assert "bpda-eot at other size: accuracy must not rise" in markdown(report)
    assert len(rows_of(report, "gradients")) == len(report.gradients)
    *costs, total = rows_of(report, "cost")
    assert [cells[0] for cells in costs] == list(report.timings)
    assert total[2] == f"{sum(timing.passes for timing in report.timings.values()):,}"
    assert report.headline is None
    chosen = rows_of(example_report(), "chosen")
    assert [int(count.replace(",", "")) for _, count in chosen] == sorted(
        (count for count in (example_report().headline or pytest.fail("none")).chosen.values() if count), reverse=True
    )


def test_an_attack_that_knows_the_noise_is_named_where_its_success_counts() -> None:
    said = "{} knows the noise that the defence draws while it searches"
    full = markdown(example_report())
    assert said.format("fixed-seed") in full
    assert said.format("bpda-eot") not in full
    assert "knows the noise" not in markdown(example_report(attacks=["bpda-eot", "transfer"]))


def test_what_was_evaluated(report: Report) -> None:
    shown = dict(rows_of(report, "evaluated"))
    assert shown["Backbone"] == "cifar10-cd"
    assert shown["Latents"] == "K = 10"
    assert shown["Iterations"].startswith("N = 200")
    assert shown["Attacks within"] == "linf, eps = 0.03137 (8/255)"
    assert shown["Images"].startswith("512 of 10 classes, drawn at random (seed 0)")
    assert shown["Runs"] == "3, with seeds 0, 1, 2"
    settings = {name: text for name, text, _ in rows_of(report, "settings")}
    assert settings["defended/bpda-eot"].startswith("PGD(threat=ThreatModel(norm='linf', eps=0.03")
    assert "gradient=StraightThrough()" in settings["defended/bpda-eot"]


def test_settings_that_the_paper_does_not_have_are_shown(report: Report) -> None:
    assert "Not the paper's" not in dict(rows_of(report, "evaluated"))
    models = copy.deepcopy(report.settings["models"])
    models["defended"]["settings"] |= {"level": 0.8, "schedule": "cosine", "of a subclass": 3}
    changed = dataclasses.replace(report, settings={**report.settings, "models": models})
    assert dict(rows_of(changed, "evaluated"))["Not the paper's"] == "schedule cosine, level 0.8, of a subclass 3"


def test_the_plots_show_what_the_tables_do(report: Report, tree: Element) -> None:
    def drawn(section: str) -> str:
        (image,) = [found for found in tree.one(id=section).all("img") if found.attributes.get("class") != "pixelated"]
        return base64.b64decode((image.attributes["src"] or "").partition(",")[2]).decode()

    accuracies = drawn("accuracy")
    for row in report.rows:
        assert f"{row.reevaluated.value:.3f}" in accuracies
    assert {"re-evaluated", "vote of 10", "all attacks: headline"} <= set(re.findall(r">([^<>]+)</text>", accuracies))
    for section in ("eps", "steps"):
        assert "as attacked" in drawn(section)
    assert "eps (linf), in 255ths" in drawn("eps")


def test_no_headline_with_its_reasons(nothing: ResultsFolder) -> None:
    report = example_report(failed=TITLES[6:], attacks=["pgd"])
    tree = check_structure(page(report, nothing))
    assert next(tree.all("h2")).text == "No headline"
    (section,) = [s for s in tree.all("section") if "none" in s.attributes.get("class", "").split()]
    assert [item.text for item in section.all("li")] == report.refused
    assert len(report.refused) == 3
    for text in (section.text, markdown(report)):
        assert "None of it is to be quoted as the robustness of the model." in text
        assert HEADLINE not in text
        assert all(reason in text for reason in report.refused)
    assert all("Do this about" in reason for reason in report.refused)


GONE: dict[str, dict[str, Any]] = {
    "checks": {"checks": []},
    "costs": {"timings": {}},
    "all rows": {"rows": [], "headline": None, "refused": ["7 work units are not done yet"]},
    "images": {},
}
SAID = {
    "checks": "None were made.",
    "costs": "No times were recorded.",
    "all rows": "Nothing has been measured yet.",
    "images": "The folder of this report does not hold the images.",
}


@pytest.mark.parametrize("part", GONE)
def test_parts_may_be_missing(small: Report, nothing: ResultsFolder, part: str) -> None:
    found = dataclasses.replace(small, **GONE[part])
    tree = check_structure(page(found, nothing))
    assert SAID[part] in tree.text
    headings = [heading.text for heading in tree.all("h2")]
    assert "Along the iterations of the purification" not in headings
    assert not any(heading.startswith("Accuracy over") for heading in headings)
    assert markdown(found).startswith("# Robustness report\n")
    assert not nothing.path.exists()


def test_names_are_text(tmp_path: Path) -> None:
    plain = dataclasses.replace(example_report(attacks=["weak", "evil"], baselines=("other",)), curves={}, sweeps=[])
    folder = example_folder(tmp_path, plain)

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {renamed(name): renamed(part) for name, part in value.items()}
        if isinstance(value, list):
            return [renamed(part) for part in value]
        return value.replace("evil", SCRIPT).replace("other", SCRIPT) if isinstance(value, str) else value

    changes = {"class_names": [SCRIPT] * 10, "refused": [SCRIPT], "headline": None}
    report = Report.from_dict(renamed(plain.to_dict()) | changes)
    text = page(report, folder)
    tree = check_structure(text)
    assert "<script" not in text
    assert SCRIPT in html.unescape(text)
    assert SCRIPT in [row[1] for row in tree.one(id="accuracy").rows() if len(row) > 1]
    assert SCRIPT in [item.text for item in tree.all("li")]
    (sheet,) = [table for table in tree.all("table") if "sheet" in (table.attributes.get("class") or "")]
    assert sheet.rows()[1][2] == f"✓ right: {SCRIPT}"
    assert any(SCRIPT in (image.attributes["alt"] or "") for image in tree.all("img"))


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_it_is_named(
    small: Report, nothing: ResultsFolder, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"{missing}.*pip install 'cmap-defense\[report\]'"):
        page(small, nothing)


def test_a_report_comes_back_from_its_json(report: Report) -> None:
    values = json.loads(json.dumps(report.to_dict()))
    assert Report.from_dict(values).to_dict() == values
    assert Report.from_dict(values).rows == report.rows
    assert Report.from_dict(values).timings["defended/clean"] == Timing(1536, 913.4, 40_960_000)


def test_a_report_prints_on_one_screen(report: Report) -> None:
    shown = repr(report)
    assert len(shown.splitlines()) <= 40
    assert all(len(line) <= 120 for line in shown.splitlines())
    assert f"headline {report.headline and report.headline.accuracy}" in shown
    assert str(report.row("latent").reevaluated) in shown
    assert "no headline" in repr(example_report(failed=TITLES[:2]))


# --- a browser --------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome on the path to open the page in; its structure was checked"
)


def opened(text: str, folder: Path) -> tuple[str, list[str]]:
    """The document of a page after Chromium has opened it, and what it wrote to its console."""
    assert BROWSER is not None
    (folder / "page.html").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
            "--v=0", "--virtual-time-budget=5000", "--dump-dom", (folder / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=HANGS, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_a_browser
def test_a_browser_fetches_nothing_for_it(text: str, tmp_path: Path) -> None:
    """Whatever came into the page by a mistake: its policy forbids the browser to ask anybody."""
    strange = '<img src="http://localhost:9/x.png" alt=""><script>document.title = "ran"</script></main>'
    shown, console = opened(text.replace("</main>", strange), tmp_path)
    assert any("localhost:9" in line and "Content Security Policy" in line for line in console), console
    assert "<title>ran" not in shown
