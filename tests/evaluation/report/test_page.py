"""The page: its structure, its figures, nothing from elsewhere, whatever is missing or how anything is named."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attack_toys import labelled, wrapped
from cmap_defense.attacks import PGD, ThreatModel, Transfer
from cmap_defense.errors import MissingExtraError
from cmap_defense.evaluation.evaluation import Evaluation
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.evaluation.report import build_report
from cmap_defense.evaluation.report.files import write_report
from cmap_defense.evaluation.report.markdown import COMPARING, HEADLINE, accuracy, headline_members
from cmap_defense.evaluation.report.page import page
from cmap_defense.evaluation.store import Store
from facts_example import TITLES, example_facts, example_store
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
def facts() -> dict[str, Any]:
    return example_facts(unseen=TITLES[4:5])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, facts: dict[str, Any]) -> Store:
    return example_store(tmp_path_factory.mktemp("evaluation"), facts)


@pytest.fixture(scope="module")
def text(facts: dict[str, Any], store: Store) -> str:
    return page(facts, store)


@pytest.fixture(scope="module")
def tree(text: str) -> Element:
    return read(text)


# ----------------------------------------------------------------------------------------------------------- structure


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
    for plot in tree.all("svg"):
        if plot.attributes.get("aria-hidden") == "true":
            continue
        assert plot.attributes["role"] == "img"
        names = [part.name for part in plot.parts if isinstance(part, Element)]
        assert names[:2] == ["title", "desc"]
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


def test_structure(text: str) -> None:
    tree = check_structure(text)
    assert len(list(tree.all("img"))) == 6 * 8
    assert len([p for p in tree.all("svg") if p.attributes.get("role")]) == 2 + 2 + 1 + 7


def test_the_order_of_things(tree: Element) -> None:
    assert [heading.text for heading in tree.all("h2")] == [
        "Headline",
        "What was evaluated",
        "Accuracy under each attack",
        "Success while searching is no success",
        "Checks of the attacks",
        "Accuracy over the size and the steps of an attack",
        "What averaging does to the gradient",
        "Along the iterations of the purification",
        "Images",
        "Cost",
        "Settings of the attacks",
        "What may be compared with this",
    ]


def test_the_same_page_each_time(facts: dict[str, Any], store: Store, text: str) -> None:
    assert page(facts, store) == text


def test_the_same_page_in_another_process(text: str, store: Store) -> None:
    code = (
        "import hashlib, sys; from pathlib import Path; from cmap_defense.evaluation.store import Store;"
        "from cmap_defense.evaluation.report.page import page; from facts_example import TITLES, example_facts;"
        "made = page(example_facts(unseen=TITLES[4:5]), Store(Path(sys.argv[1])));"
        "print(hashlib.sha256(made.encode()).hexdigest(), 'matplotlib.pyplot' in sys.modules)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(store.folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [hashlib.sha256(text.encode()).hexdigest(), "False"], done.stderr


# ------------------------------------------------------------------------------------------------------------- figures


def test_the_headline_in_plain_words(facts: dict[str, Any], tree: Element) -> None:
    found, (section,) = (
        facts["headline"],
        [s for s in tree.all("section") if "headline" in s.attributes.get("class", "")],
    )
    assert f"34.7 % {HEADLINE}" in section.text
    assert headline_members(facts) in section.text
    assert accuracy(found["accuracy"]) in section.text
    assert f"3 runs: {found['spread']:.3f}." in section.text
    assert accuracy(found["lowest"]) in section.text
    assert f"luck would leave between {found['clean']['value']:.3f}, the vote on clean images" in section.text
    assert f"and {found['lowest_by_luck']:.3f}, as many votes on them by unrelated noise" in section.text
    assert "8 checks of the attacks passed, 1 could not be seen" in section.text
    beside = {term.text: value.text for term, value in zip(section.all("dt"), section.all("dd"), strict=True)}
    rows = {(row["subject"], row["attack"]): accuracy(row["repurified"]) for row in facts["rows"]}
    assert beside == {
        "Defended model, clean images": rows["defended", "control"],
        "Defended model, all attacks": accuracy(found["accuracy"]),
        "Without the defence, clean images": rows["undefended", "control"],
        "Without the defence, under pgd": rows["undefended", "pgd"],
        "adversarially-trained, clean images": rows["adversarially-trained", "control"],
        "adversarially-trained, under pgd": rows["adversarially-trained", "pgd"],
    }


@pytest.mark.parametrize("value", [0.0285, 0.3125, 0.12349999, 0.0, 1.0])
def test_a_percentage_is_rounded_as_the_accuracy_beside_it(value: float, tmp_path: Path) -> None:
    facts = example_facts(attacks=["pgd"]) | {"curves": {}, "sweeps": [], "gradients": []}
    facts["headline"]["accuracy"]["value"] = value
    text = page(facts, Store(tmp_path))
    (percent,) = re.findall(r'<span class="number">([\d.]+) %', text)
    assert percent == f"{float(f'{value:.3f}') * 100:.1f}"
    assert f"Accuracy {value:.3f} [" in text


def test_every_accuracy_from_the_strongest_attack_down(facts: dict[str, Any], tree: Element) -> None:
    shown = tree.one(id="accuracies").rows()
    protocol = facts["settings"]["protocol"]
    assert shown[0] == [
        "attack",
        "one-shot",
        "average",
        "any of 10",
        "vote of 10",
        "re-purified",
        "spread",
        "one latent",
    ]
    assert protocol["answers"] == 10
    titles = [row[0] for row in shown[1:] if len(row) == 1]
    assert titles == [
        "Defended model, attacked",
        "Defended model, not attacked",
        "Without the defence",
        "adversarially-trained",
    ]
    cells = [row for row in shown[1:] if len(row) > 1]
    own = [row for row in facts["rows"] if row["subject"] == "defended"]
    attacks = sorted((r for r in own if r["attack"] != "control"), key=lambda row: row["repurified"]["value"])
    expected = [*attacks, own[0], *(row for row in facts["rows"] if row["subject"] != "defended")]
    assert len(cells) == len(expected) == len(facts["rows"])
    for row, found in zip(expected, cells, strict=True):
        assert found[0] == ("clean images" if row["attack"] == "control" else row["attack"])
        for name, cell in zip(("one_shot", "average", "any_of", "vote", "repurified"), found[1:6], strict=True):
            value, _, interval = accuracy(row[name]).partition(" ")
            assert cell == f"{value} ({row['spread'][name]:.3f}) {interval}"
        assert found[6] == f"{row['answers_spread']:.3f}"
        assert found[7] == ("" if row["one_latent"] is None else f"{row['one_latent']:.3f}")


def test_the_plot_shows_what_the_table_does(facts: dict[str, Any], tree: Element) -> None:
    wide, narrow = (p for p in tree.all("svg") if (p.attributes.get("aria-labelledby") or "").startswith("accuracies"))
    expected = [f"{row[name]['value']:.3f}" for row in facts["rows"] for name in ("repurified", "vote")]
    expected.append(f"{facts['headline']['accuracy']['value']:.3f}")
    for plot in (wide, narrow):
        shown = [text.text for text in plot.all("text")]
        assert sorted(text for text in shown if re.fullmatch(r"\d\.\d{3}", text)) == sorted(expected)
        assert {"re-purified", "vote of 10", "Headline"} <= set(shown)
        (about,) = plot.all("desc")
        assert all(accuracy(row["repurified"]) in about.text for row in facts["rows"])


def test_the_worst_attacks(facts: dict[str, Any], tree: Element) -> None:
    chosen = sorted(((n, c) for n, c in facts["headline"]["chosen"].items() if c), key=lambda item: -item[1])
    assert [row[:2] for row in tree.one(id="chosen").rows()[1:]] == [[name, f"{count:,}"] for name, count in chosen]


def test_searching_against_luck(facts: dict[str, Any], tree: Element) -> None:
    shown = {row[0]: row[1:] for row in tree.one(id="searched").rows() if len(row) > 1}
    for row in facts["rows"]:
        if row["subject"] == "defended" and row["searched"] is not None:
            expected = [str(row["search_answers"]), accuracy(row["searched"]), accuracy(row["searched_by_luck"])]
            assert shown[row["attack"]] == expected
        elif row["subject"] == "defended":
            assert row["attack"] not in shown


def test_checks_in_words(store: Store) -> None:
    facts = example_facts(failed=TITLES[7:8], unseen=TITLES[4:5])
    tree = read(page(facts, store))
    shown = tree.one(id="check-table").rows()[1:]
    words = {True: "✓ passed", False: "✗ failed", None: "– not seen"}
    assert shown == [[words[check["passed"]], check["name"], check["found"]] for check in facts["checks"]]
    assert "7 passed, 1 failed, 1 could not be seen" in tree.text


def test_sweeps_and_gradients(facts: dict[str, Any], tree: Element) -> None:
    tables = [table.rows() for table in tree.all("table") if table.attributes.get("class") == "sweep-table"]
    for sweep, table in zip(sorted(facts["sweeps"], key=lambda s: s["name"]), tables, strict=True):
        assert table[0][0] == sweep["name"]
        assert [row[1] for row in table[1:]] == [
            f"{share:.3f} ± {error:.3f}" for share, error in zip(sweep["accuracies"], sweep["errors"], strict=True)
        ]
        assert [float(row[0].split(",")[0]) for row in table[1:]] == pytest.approx(sweep["values"], rel=1e-5)
    assert tables[0][-1][0] == "1, any image"
    assert tree.one(id="gradients").rows()[1:] == [
        [f"{row['samples']:.0f}", f"{row['cosine']:.3f} ± {row['error']:.3f}", f"{row['variance']:.3g}"]
        for row in facts["gradients"]
    ]
    assert "bpda-eot with fewer steps, and at other sizes" in tree.text


def test_the_plots_mark_the_attacks_own_settings(tree: Element) -> None:
    for name, own in (("sweep-eps", "8"), ("sweep-steps", "20")):
        (plot,) = [p for p in tree.all("svg") if (p.attributes.get("aria-labelledby") or "").startswith(name)]
        shown = [text.text for text in plot.all("text")]
        assert any("as attacked" in text for text in shown)
        assert own in shown or f"{own} as attacked" in shown
    assert "eps (linf), in 255ths" in tree.text


def test_the_course_of_purifications(facts: dict[str, Any], tree: Element) -> None:
    (keys,) = [e for e in tree.all("ul") if e.attributes.get("class") == "keys"]
    strongest = sorted((r for r in facts["rows"] if r["subject"] == "defended"), key=lambda r: r["repurified"]["value"])
    assert [item.text for item in keys.all("li")] == ["clean images", *(row["attack"] for row in strongest[:3])]
    plots = [p for p in tree.all("svg") if (p.attributes.get("aria-labelledby") or "").startswith("course-")]
    assert len(plots) == 7
    assert [("prior 0" in plot.text, "prior 1" in plot.text) for plot in plots[-2:]] == [(True, False), (False, True)]
    ends = facts["curves"]["defended/control"]["latent_std"]
    assert f"clean images from {ends[0]:.4g} to {ends[-1]:.4g}" in plots[-1].text


def test_images_with_labels_and_answers(facts: dict[str, Any], store: Store, tree: Element) -> None:
    (sheet,) = [table for table in tree.all("table") if "sheet" in (table.attributes.get("class") or "")]
    body = sheet.rows()[2:]
    assert len(body) == 6
    assert all(row[0].endswith(f"no. {number}") for number, row in enumerate(body))
    assert body[0][0].startswith("automobile")
    assert body[0][2] == "✓ right: automobile"
    assert {cell for row in body for cell in row[1:] if cell} - {"✓ right: automobile"}
    assert all(re.fullmatch("✓ right: .+|✗ wrong: .+|", cell) for row in body for cell in row[1:])
    assert all(image.attributes.get("class") == "pixelated" for image in sheet.all("img"))


def test_costs(facts: dict[str, Any], tree: Element) -> None:
    head, *shown, total = tree.one(id="costs").rows()
    assert head == ["task", "queries", "backbone passes", "minutes"]
    queries = {f"{row['subject']}/{row['attack']}": row["queries"] for row in facts["rows"]}
    assert shown == [
        [
            name,
            "" if queries.get(name) is None else f"{queries[name]:,}",
            f"{facts['passes'][name]:,}",
            f"{seconds / 60:.1f}",
        ]
        for name, seconds in facts["seconds"].items()
    ]
    assert total == ["all", "", f"{sum(facts['passes'].values()):,}", f"{sum(facts['seconds'].values()) / 60:.1f}"]


def test_settings_and_what_may_be_compared(facts: dict[str, Any], tree: Element) -> None:
    shown = {}
    for details in tree.all("details"):
        (summary,) = details.all("summary")
        shown[summary.text] = " ".join(code.text for code in details.all("code"))
    tasks = facts["settings"]["tasks"]
    expected = {name: t["attack"] for name, t in tasks.items() if t["attack"] and not name.startswith("checks/")}
    assert {name: code for name, code in shown.items() if code} == expected
    points = " ".join(item.text for item in tree.one(**{"aria-labelledby": "comparing"}).all("li"))
    assert points == " ".join(COMPARING.split("\n\n", 1)[1].replace("\n- ", " ").removeprefix("- ").split())


def test_what_was_evaluated(tree: Element) -> None:
    section = tree.one(**{"aria-labelledby": "evaluated"})
    shown = {term.text: value.text for term, value in zip(section.all("dt"), section.all("dd"), strict=True)}
    assert shown["Backbone"] == "cifar10-cd"
    assert shown["Latents"] == "K = 10"
    assert shown["Iterations"].startswith("N = 200")
    assert shown["Attacks within"] == "linf, eps = 0.03137 (8/255)"
    assert shown["Images"] == "512 of 10 classes, drawn at random (seed 0)"
    assert shown["Runs"].startswith("3, with seeds 0, 1, 2")
    assert shown["Answers"].startswith("10 to each final image, and 20 further ones")


# ----------------------------------------------------------------------------------------------------- what is missing


def test_no_headline_with_its_reasons(store: Store) -> None:
    facts = example_facts(failed=TITLES[6:])
    tree = check_structure(page(facts, store))
    assert next(tree.all("h2")).text == "No headline"
    (section,) = [s for s in tree.all("section") if "none" in s.attributes.get("class", "").split()]
    assert [item.text for item in section.all("li")] == facts["refused"]
    assert len(facts["refused"]) == 3
    assert "None of it is to be quoted as the robustness of the model." in section.text
    assert HEADLINE not in tree.text
    assert all("Do this about" in item.text for item in section.all("li"))


GONE: dict[str, dict[str, Any]] = {
    "curves": {"curves": {}},
    "checks": {"checks": [], "sweeps": [], "gradients": []},
    "class names": {"class_names": None},
    "costs": {"seconds": {}, "passes": {}},
    "all rows": {"rows": [], "headline": None, "refused": ["7 pieces are not done yet"], "curves": {}},
    "sweeps": {"sweeps": []},
    "gradients": {"gradients": []},
}


@pytest.mark.parametrize("part", GONE)
def test_parts_may_be_missing(facts: dict[str, Any], store: Store, part: str) -> None:
    tree = check_structure(page(facts | GONE[part], store))
    headings = [heading.text for heading in tree.all("h2")]
    assert ("Along the iterations of the purification" in headings) == ("curves" not in GONE[part])
    assert ("Accuracy over the size and the steps of an attack" in headings) == ("sweeps" not in GONE[part])
    assert ("What averaging does to the gradient" in headings) == ("gradients" not in GONE[part])
    assert ("None were made." in tree.text) == (part == "checks")
    assert ("No times were noted." in tree.text) == (part == "costs")
    assert ("Nothing has been measured yet." in tree.text) == (part == "all rows")
    assert ("class 1" in tree.text) == (part == "class names")


def test_no_baselines(store: Store) -> None:
    tree = check_structure(page(example_facts(baselines=()), store))
    assert "Without the defence" not in tree.text


@pytest.mark.parametrize("seeds", [(0,), (3, 4)])
def test_one_run_or_some(store: Store, seeds: tuple[int, ...]) -> None:
    facts = example_facts(seeds=seeds)
    tree = check_structure(page(facts, store))
    cell = next(row for row in tree.one(id="accuracies").rows() if len(row) > 1 and row[0] == "latent")[1]
    assert ("(" in cell) == (len(seeds) > 1)
    assert ("Standard deviation over the" in tree.text) == (len(seeds) > 1)
    assert f"{len(seeds)} run{'s' if len(seeds) > 1 else ''}" in next(tree.all("header")).text


def test_no_attack(tmp_path: Path) -> None:
    facts = example_facts(attacks=[], baselines=())
    tree = check_structure(page(facts, example_store(tmp_path, facts)))
    assert next(tree.all("li")).text == "there was no attack"
    assert "There was no attack." in tree.text
    assert "No attack here asks the model as it is while it searches." in tree.text


def test_grey_images(tmp_path: Path) -> None:
    facts = example_facts(attacks=["pgd"])
    tree = check_structure(page(facts, example_store(tmp_path, facts, channels=1, size=28)))
    assert len(list(tree.all("img"))) == 6 * 5


def test_large_images_are_smooth_and_small_enough(tmp_path: Path) -> None:
    facts = example_facts(attacks=["pgd"])
    text = page(facts, example_store(tmp_path, facts, size=224))
    assert 'class="pixelated"' not in text
    assert len(text) < 4_000_000


def test_no_images(facts: dict[str, Any], tmp_path: Path) -> None:
    tree = check_structure(page(facts, Store(tmp_path / "nothing")))
    assert "The folder of this report does not hold the images." in tree.text
    assert not (tmp_path / "nothing").exists()


def test_a_model_without_latents(store: Store, tmp_path: Path) -> None:
    facts = example_facts(attacks=["pgd"]) | {"curves": {}}
    facts["settings"]["models"]["defended"] = {"class": "robust.Net", "weights": "ab", "precision": "torch.float32"}
    for row in facts["rows"]:
        row["one_latent"] = None
    tree = check_structure(page(facts, store))
    assert "one latent" not in tree.text
    assert next(tree.all("header")).text.startswith("Robustness report Net; linf")


def test_l2_and_an_image_of_unknown_accuracy(store: Store) -> None:
    facts = example_facts(attacks=["pgd"], threat=ThreatModel(norm="l2", eps=0.5))
    facts["rows"][1]["repurified"] = {"value": None, "interval": [0.0, 1.0], "correct": 0, "total": 0}
    tree = check_structure(page(facts, store))
    assert "l2, eps = 0.5;" in tree.text
    assert "no images" in tree.text


# --------------------------------------------------------------------------------------------------- names of the user


def test_names_are_text(tmp_path: Path) -> None:
    plain = example_facts(attacks=["weak", "evil"], baselines=("other",))
    store = example_store(tmp_path, plain)

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {renamed(name): renamed(part) for name, part in value.items()}
        if isinstance(value, list):
            return [renamed(part) for part in value]
        return value.replace("evil", SCRIPT).replace("other", SCRIPT) if isinstance(value, str) else value

    facts = renamed(plain) | {"class_names": [SCRIPT] * 10, "refused": [SCRIPT], "headline": None}
    facts["checks"][0]["found"] = SCRIPT
    text = page(facts, store)
    check_structure(text)
    assert "<script" not in text
    assert SCRIPT in html.unescape(text)
    tree = read(text)
    assert SCRIPT in [row[0] for row in tree.one(id="accuracies").rows()]
    assert SCRIPT in [item.text for item in tree.all("li")]
    (sheet,) = [table for table in tree.all("table") if "sheet" in (table.attributes.get("class") or "")]
    assert sheet.rows()[2][2] == f"✓ right: {SCRIPT}"
    assert any(SCRIPT in (image.attributes["alt"] or "") for image in tree.all("img"))


def test_names_in_any_script(tmp_path: Path) -> None:
    names = ["日本語", "$x^2$ & \\alpha", "ب" * 60, "a" * 300, "{{ 7 * 7 }}"]
    facts = example_facts(attacks=names) | {"class_names": [f"鸟 {n}" for n in range(10)]}
    tree = check_structure(page(facts, Store(tmp_path)))
    shown = [row[0] for row in tree.one(id="accuracies").rows()]
    assert set(names) <= set(shown)


# -------------------------------------------------------------------------------------------------------- in the whole


def test_a_real_evaluation(tmp_path: Path) -> None:
    threat = ThreatModel(eps=0.1)
    evaluation = Evaluation(
        wrapped(),
        labelled(4),
        tmp_path,
        attacks={"transfer": Transfer(PGD(threat, steps=1)), "bpda-eot": PGD(threat, steps=2, eot=2)},
        baseline_attacks={"pgd": PGD(threat, steps=2)},
        protocol=Protocol(answers=2, repurifications=2, group=2, sanity_images=2, gradient_samples=4, seeds=(0, 1)),
        threads=1,
    )
    evaluation.run()
    facts = build_report(evaluation).to_dict()
    files, lacking = write_report(facts, tmp_path)
    assert lacking is None
    assert files[-1].name == "report.html"
    text = files[-1].read_text(encoding="utf-8")
    tree = check_structure(text)
    assert text == page(facts, Store(tmp_path))
    assert len([row for row in tree.one(id="accuracies").rows()[1:] if len(row) > 1]) == len(facts["rows"]) == 5
    assert len(list(tree.all("img"))) == 4 * 8
    assert "eps (linf)" in tree.text
    assert "bpda-eot with fewer steps" in tree.text
    assert all(row["name"] in ("eps", "steps") for row in facts["sweeps"])


def test_the_template_is_part_of_the_package() -> None:
    assert (Path(sys.modules[page.__module__].__file__ or "").parent / "template.html.j2").is_file()


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_it_is_named(
    facts: dict[str, Any], store: Store, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"{missing}.*pip install 'cmap-defense\[report\]'"):
        page(facts, store)


# ------------------------------------------------------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_all_colours_can_be_read_on_light_and_dark(text: str) -> None:
    schemes = re.findall(r":root \{([^}]+)\}", text)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        assert {
            "ink",
            "muted",
            "grid",
            "paper",
            "raised",
            "series-1",
            "series-2",
            "series-3",
            "good",
            "bad",
            "open",
        } == set(colours)
        for ground in ("paper", "raised"):
            below = luminance(colours[ground])
            for name in set(colours) - {"paper", "raised", "grid"}:
                above = luminance(colours[name])
                contrast = (max(above, below) + 0.05) / (min(above, below) + 0.05)
                assert contrast >= 4.5, (name, ground, contrast)


# ----------------------------------------------------------------------------------------------------------- a browser

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
def test_a_browser_opens_it_without_a_complaint(text: str, tmp_path: Path) -> None:
    shown, console = opened(text, tmp_path)
    assert console == []
    before, after = read(text), read(shown)
    for names in (("h1", "h2", "h3"), ("tr",), ("img",), ("svg",), ("text",)):
        assert [e.text for e in after.all(*names)] == [e.text for e in before.all(*names)]


@in_a_browser
def test_a_browser_fetches_nothing_for_it(text: str, tmp_path: Path) -> None:
    """Whatever came into the page by a mistake: its policy forbids the browser to ask anybody."""
    strange = '<img src="http://localhost:9/x.png" alt=""><script>document.title = "ran"</script></main>'
    shown, console = opened(text.replace("</main>", strange), tmp_path)
    assert any("localhost:9" in line and "Content Security Policy" in line for line in console), console
    assert "<title>ran" not in shown


@in_a_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(text: str, tmp_path: Path, width: int) -> None:
    inside = json.dumps(text).replace("<", "\\u003c")
    measured = f"""<!doctype html><body><script>
    const frame = document.createElement("iframe");
    frame.style = "width: {width}px; height: 900px; border: 0";
    frame.onload = () => {{
      const root = frame.contentDocument.documentElement;
      document.title = [root.clientWidth, root.scrollWidth].join(" ");
    }};
    frame.srcdoc = {inside};
    document.body.append(frame);
    </script>"""
    shown, _ = opened(measured, tmp_path)
    (sizes,) = re.findall(r"<title>(\d+ \d+)</title>", shown)
    inner, needed = map(int, sizes.split())
    assert width - 20 <= inner <= width
    assert needed <= inner
