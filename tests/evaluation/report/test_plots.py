"""The plots: what they draw, in whose colours, the same each time, and nothing left behind."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from cmap_defense.errors import MissingExtraError
from cmap_defense.evaluation.report.plots import (
    PANEL,
    Bar,
    Bars,
    Line,
    accuracies,
    averaging,
    course,
    key,
    sweep,
)
from cmap_defense.evaluation.report.svg import COLOURS, shortened

WORDS = {"title": "a title", "description": "what is to be seen"}
GRADIENTS = [{"samples": n, "cosine": n / (n + 3), "error": 0.02, "variance": 1 / n} for n in (1, 2, 4)]
SIZES = {
    "name": "eps",
    "values": [0.0, 2 / 255, 8 / 255, 1.0],
    "accuracies": [0.9, 0.6, 0.3, 0.0],
    "errors": [0.05, 0.1, 0.1, 0.0],
}
STEPS = {"name": "steps", "values": [0.0, 5.0, 20.0], "accuracies": [0.9, 0.6, 0.5], "errors": [0.05, 0.1, 0.1]}
LINES = [Line(range(50), [0.02 * n + number for n in range(50)], number) for number in range(4)]


def share(value: float | None, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    return {"value": value, "interval": [low, high], "correct": None, "total": 100}


def forest(*, narrow: bool = False, names: Sequence[str] = ("pgd", "latent")) -> str:
    bars = [Bar(name, share(0.5, 0.25, 0.75), share(0.6, 0.3, 0.7)) for name in names]
    worst = Bar("worst", share(0.1, 0.05, 0.2), None, "D")
    return accuracies([Bars("Together", [worst]), Bars("Each", bars)], 10, narrow=narrow, **WORDS)


def sizes(**changes: Any) -> str:
    return sweep(SIZES, **({"any_image": True, "own": 8 / 255, "axis": "eps (linf)", **WORDS} | changes))


PLOTS = {
    "wide": forest,
    "narrow": lambda: forest(narrow=True),
    "eps": sizes,
    "steps": lambda: sweep(STEPS, any_image=False, own=20.0, axis="steps", **WORDS),
    "averaging": lambda: averaging(GRADIENTS, **WORDS),
    "share": lambda: course(LINES[:1], "share", "accuracy", share=True, **WORDS),
    "loss": lambda: course(LINES, "loss", "loss", **WORDS),
    "prior": lambda: course(LINES, "prior", "mean", prior=0.0, **WORDS),
}


def words(drawn: str) -> list[str]:
    """All text of a plot, in its order."""
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(drawn).iter("text")]


def paths(drawn: str) -> list[str]:
    return [element.attrib["d"] for element in ElementTree.fromstring(drawn).iter("path") if "d" in element.attrib]


@pytest.mark.parametrize("name", PLOTS)
def test_the_same_each_time_and_nothing_left_behind(name: str) -> None:
    settings, modules = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    first, second = PLOTS[name](), PLOTS[name]()
    assert first == second
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == modules


@pytest.mark.parametrize("name", PLOTS)
def test_settings_of_the_user_do_not_show(name: str) -> None:
    plain = PLOTS[name]()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": False, "lines.linewidth": 9}):
        assert PLOTS[name]() == plain


@pytest.mark.parametrize("name", PLOTS)
def test_an_element_of_a_page(name: str) -> None:
    drawn = PLOTS[name]()
    root = ElementTree.fromstring(drawn)
    assert root.tag == "svg"
    assert root[0].tag == "title"
    assert root[0].text == "a title"
    assert root[1].tag == "desc"
    assert root[1].text == "what is to be seen"
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == f"{root[0].attrib['id']} {root[1].attrib['id']}"
    assert not re.search("xmlns|http|metadata|<style|<!|<\\?", drawn)


@pytest.mark.parametrize("name", PLOTS)
def test_colours_and_font_are_the_pages(name: str) -> None:
    drawn = PLOTS[name]()
    assert "#0101" not in drawn
    used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawn)) - {"none"}
    assert used <= {f"var(--{colour}, {default})" for colour, (_, default) in COLOURS.items()}
    fonts = re.findall(r"font-family: ([^;\"]+)", drawn) + re.findall(r"font: ([^;\"]+)", drawn)
    assert fonts
    assert all("var(--font, " in font and font.endswith("sans-serif)") for font in fonts)


def test_no_two_elements_of_all_plots_have_one_id() -> None:
    together = "".join(draw() for draw in PLOTS.values()) + "".join(map(key, range(4)))
    ids = re.findall(r'\bid="([^"]+)"', together)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#(\w+)"', together)) | set(re.findall(r"url\(#(\w+)\)", together)) <= set(ids)


def test_dots_and_whiskers_stand_where_the_shares_are() -> None:
    drawn = forest()
    assert "value" not in drawn
    whiskers = {
        (float(x), float(end))
        for x, end in re.findall(r"M ([\d.]+) [\d.]+ L ([\d.]+) [\d.]+", " ; ".join(paths(drawn)))
    }
    place = lambda share: pytest.approx(214 + 390 * share, abs=0.01)  # noqa: E731
    for low, high in ((0.25, 0.75), (0.3, 0.7), (0.05, 0.2)):
        assert any(x == place(low) and end == place(high) for x, end in whiskers), (low, high)
    dots = [float(element.attrib["x"]) for element in ElementTree.fromstring(drawn).iter("use")]
    assert sum(x == place(0.5) for x in dots) == 2
    assert sum(x == place(0.6) for x in dots) == 2
    assert sum(x == place(0.1) for x in dots) == 1


@pytest.mark.parametrize("narrow", [False, True])
def test_values_and_names_can_be_read(narrow: bool) -> None:
    found = words(forest(narrow=narrow))
    assert {"re-purified", "vote of 10", "Together", "Each", "worst", "pgd", "latent"} <= set(found)
    assert [word for word in found if word in ("0.500", "0.600", "0.100")] == [
        "0.100",
        "0.500",
        "0.600",
        "0.500",
        "0.600",
    ]


def test_a_vote_and_an_answer_are_told_apart_without_colour() -> None:
    drawn = re.sub(r"var\(--series-\d, #\w+\)", "x", forest(names=["pgd"]))
    marks = list(ElementTree.fromstring(drawn).iter("use"))
    shapes = {(element.attrib["href"], element.attrib["style"]) for element in marks}
    assert len(shapes) == 3  # circle, square, diamond
    assert len(set(re.findall(r"stroke: x; stroke-width: ([\d.]+)", drawn))) > 1


def test_an_attack_without_images_has_no_dot() -> None:
    drawn = accuracies([Bars("Each", [Bar("empty", share(None), None)])], 3, narrow=False, **WORDS)
    assert "empty" in words(drawn)
    assert len(list(ElementTree.fromstring(drawn).iter("use"))) == 2  # those of the key


STRANGE = [
    "<script>alert(1)</script>",
    "a$b$c",
    "日本語 العربية 🦆",
    "x" * 200,
    "tab\tbell\x07null\x00",
    "\ud800",
    "\\frac{1}{2}",
    "",
]


@pytest.mark.parametrize("name", STRANGE)
def test_any_name_can_be_drawn(name: str) -> None:
    for narrow in (False, True):
        drawn = forest(names=[name], narrow=narrow)
        assert "<script" not in drawn
        assert shortened(name, 40 if narrow else 31).strip() in [*words(drawn), ""]
    course(LINES, "loss", shortened(name, 40), title=name, description=name).encode()


def test_names_are_cut() -> None:
    assert shortened("short", 5) == "short"
    assert shortened("longer", 5) == "long…"
    assert shortened("a\x00b\n", 5) == "a�b�"


def test_eps_is_logarithmic_with_0_and_any_image_apart() -> None:
    drawn = sizes()
    found = words(drawn)
    assert [word for word in found if word in ("0", "2", "8", "any", "image", "as attacked", "any image")][:3] == [
        "0",
        "2",
        "8",
    ]
    assert "eps (linf), in 255ths" in found
    assert found.count("//") == 2
    assert {"0.900", "0.600", "0.300", "0.000"} <= set(found)
    root = ElementTree.fromstring(drawn)
    dots = sorted({float(use.attrib["x"]) for use in root.iter("use") if float(use.attrib["y"]) > 0})
    assert len(dots) == 4
    assert dots[2] - dots[1] == pytest.approx(2 * (dots[1] - dots[0]), rel=0.01)  # 2 to 8 is two powers of two
    assert any("as attacked" in word for word in found)
    assert any("any" in word for word in found)


def test_eps_that_is_no_whole_255th_stays_as_it_is() -> None:
    facts = SIZES | {"values": [0.0, 0.0125, 0.05, 1.0]}
    found = words(sweep(facts, any_image=True, own=None, axis="eps (linf)", **WORDS))
    assert {"0.0125", "0.05", "eps (linf)"} <= set(found)
    assert not any("attacked" in word for word in found)


@pytest.mark.parametrize(
    ("values", "any_image"),
    [([0.0, 1.0], True), ([0.05], False), ([0.0, 0.05], False), ([0.05, 1.0], True)],
)
def test_short_sweeps(values: list[float], any_image: bool) -> None:
    count = len(values)
    facts = {"name": "eps", "values": values, "accuracies": [0.5] * count, "errors": [0.0] * count}
    assert sweep(facts, any_image=any_image, own=None, axis="eps", **WORDS).startswith("<svg")


def test_steps_are_linear() -> None:
    drawn = PLOTS["steps"]()
    dots = sorted({float(use.attrib["x"]) for use in ElementTree.fromstring(drawn).iter("use")})
    assert dots[2] - dots[0] == pytest.approx(4 * (dots[1] - dots[0]), rel=0.01)
    assert "//" not in words(drawn)


def test_gradients_are_over_powers_of_two_and_may_be_negative() -> None:
    below = averaging(
        [{"samples": 1, "cosine": -0.3, "error": 0.1}, {"samples": 64, "cosine": 0.9, "error": 0.0}], **WORDS
    )
    assert {"1", "64"} <= set(words(below))
    assert any(word.startswith("−0.4") for word in words(below))
    assert not any(word.startswith("−") for word in words(PLOTS["averaging"]()))


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 5.0], [1e-3, 1e9], [1e9, 1e9 + 1]])
def test_any_course(values: list[float]) -> None:
    for prior in (None, 0.0, 1.0):
        drawn = course([Line(range(len(values)), values)], "loss", "loss", prior=prior, **WORDS)
        assert ("prior" in drawn) == (prior is not None)
        assert all(0 <= float(use.attrib["y"]) <= PANEL[1] for use in ElementTree.fromstring(drawn).iter("use"))


def test_a_loss_over_many_powers_of_ten_is_logarithmic() -> None:
    steep = words(course([Line(range(4), [1000.0, 100.0, 10.0, 1.0])], "loss", "loss", **WORDS))
    assert {"1", "10", "100", "1000"} <= set(steep)
    flat = words(course([Line(range(4), [1000.0, 700.0, 400.0, 200.0])], "loss", "loss", **WORDS))
    assert {"200", "400", "600", "800", "1000"} <= set(flat)


def test_lines_are_told_apart_without_colour() -> None:
    drawn = re.sub(r"var\(--[\w-]+, #\w+\)", "x", PLOTS["loss"]())
    lines = [
        e.attrib["style"]
        for e in ElementTree.fromstring(drawn).iter("path")
        if "stroke-width: 1.6" in e.get("style", "")
    ]
    assert len(lines) == len(set(lines)) == 4
    keys = [re.sub(r"var\(--[\w-]+, #\w+\)|\w{11}", "x", key(number)) for number in range(4)]
    assert len(set(keys)) == 4


def test_a_key_is_decoration() -> None:
    root = ElementTree.fromstring(key(1))
    assert root.attrib["aria-hidden"] == "true"
    assert root.find("title") is None


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cmap-defense\[report\]'"):
        key(0)
