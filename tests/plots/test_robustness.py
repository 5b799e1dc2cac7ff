"""The plots of a report: what they show, the same bytes each time, and nothing left behind."""

import re
import sys
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from cmap_defense.common.statistics import Accuracy
from cmap_defense.errors import MissingExtraError, SettingsError
from cmap_defense.plots.figure import draw, printable
from cmap_defense.plots.robustness import accuracy_plot, cosine_plot, curve_plot, sweep_plot

GRADIENTS = [{"samples": n, "cosine": n / (n + 3), "error": 0.02, "variance": 1 / n} for n in (1, 2, 4)]
LINES = {f"attack {number}": (range(50), [0.02 * n + number + 1 for n in range(50)]) for number in range(4)}


def accuracies(names: Sequence[str] = ("pgd", "latent")) -> bytes:
    rows = [(name, Accuracy(50, 100), Accuracy(62, 100)) for name in names]
    return accuracy_plot([("worst", Accuracy(10, 100), None), *rows], 10)


def sizes(values: Sequence[float] = (0.0, 2 / 255, 8 / 255, 1.0), **changes: Any) -> bytes:
    given = {"any_image": True, "own": 8 / 255, "axis": "eps (linf)"} | changes
    shares = [0.9, 0.6, 0.3, 0.0][: len(values)]
    return sweep_plot("eps", values, shares, [0.05] * len(values), **given)


def steps() -> bytes:
    return sweep_plot("steps", [0.0, 5.0, 20.0], [0.9, 0.6, 0.5], [0.05] * 3, axis="steps", own=20.0, any_image=False)


PLOTS = {
    "accuracies": accuracies,
    "eps": sizes,
    "steps": steps,
    "cosines": lambda: cosine_plot(GRADIENTS),
    "share": lambda: curve_plot({"clean": (range(3), [0.1, 0.5, 0.9])}, "accuracy", share=True),
    "prior": lambda: curve_plot(LINES, "mean", prior=0.0),
}


def words(drawn: bytes) -> list[str]:
    """All text of a plot, in its order."""
    texts = (element for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("}text"))
    return ["".join(element.itertext()).strip() for element in texts]


@pytest.mark.parametrize("name", PLOTS)
def test_the_same_bytes_whatever_the_users_settings_are_and_nothing_left_behind(name: str) -> None:
    settings, modules = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    plain = PLOTS[name]()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert PLOTS[name]() == plain
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == modules
    assert ElementTree.fromstring(plain).tag.endswith("svg")


def test_accuracies_and_names_can_be_read_and_distinguished_without_colour() -> None:
    found = words(accuracies())
    assert {"re-evaluated", "vote of 10", "worst", "pgd", "latent"} <= set(found)
    assert sorted(word for word in found if re.fullmatch(r"0\.\d{3}", word)) == [
        "0.100",
        *["0.500"] * 2,
        *["0.620"] * 2,
    ]
    markers = set(re.findall(r'<path id="(m\w+)"', accuracies().decode()))
    assert len(markers) >= 2


STRANGE = [
    "<script>alert(1)</script>",
    "a$b$c",
    "日本語 العربية 🦆",
    "x" * 200,
    "tab\tbell\x07null\x00",
    "\\frac{1}{2}",
    "",
]


def test_any_name_can_be_drawn() -> None:
    drawn = accuracies(names=STRANGE)
    assert b"<script" not in drawn
    assert {printable(name, 44).strip() for name in STRANGE} <= {*words(drawn), ""}
    curve_plot({name: (range(2), [1.0, 2.0]) for name in STRANGE}, "loss")


def test_eps_is_in_255ths_where_it_is_a_whole_number_of_them() -> None:
    found = " ".join(words(sizes()))
    for word in ("0", "2", "8", "as attacked", "any", "eps (linf), in 255ths", "0.900", "0.600", "0.300", "0.000"):
        assert word in found
    found = " ".join(words(sizes((0.0, 0.0125, 0.05, 1.0), own=None)))
    assert "0.0125" in found
    assert "255ths" not in found
    assert "as attacked" not in found


def test_cosines_are_over_powers_of_two_and_may_be_negative() -> None:
    rows = [{"samples": 1, "cosine": -0.3, "error": 0.1}, {"samples": 64, "cosine": 0.9, "error": 0.0}]
    assert {"1", "64"} <= set(words(cosine_plot(rows)))
    assert any(word.startswith("−0.4") for word in words(cosine_plot(rows)))
    assert not any(word.startswith("−") for word in words(cosine_plot(GRADIENTS)))


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-1.0, 5.0], [1e-3, 1e9], [1e9, 1e9 + 1]])
def test_any_curve(values: list[float]) -> None:
    for prior in (None, 1.0):
        found = words(curve_plot({"clean": (range(len(values)), values)}, "loss", prior=prior))
        assert ("prior 1" in found) == (prior is not None)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="picture"):
        draw((1, 1), lambda figure: None, purpose="It", picture="gif")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cmap-defense\[report\]'"):
        steps()
