"""The plots of a comparison."""

import re

import pytest

from cmap_defense.plots.comparison import comparison_plot

CHAIN = "chain-purifiers=(diffpure-t=60-step=0.01,cmap-level=0.5-iterations="


def row(name: str, passes: int, clean: float, worst: float) -> dict:
    return {
        "name": name,
        "passes": passes,
        "clean": {"value": clean},
        "worst": {"value": worst, "interval": (worst - 0.1, worst + 0.1)},
    }


@pytest.mark.parametrize("most", [80, 20_100])
def test_names_that_begin_alike_are_distinguished(most: int) -> None:
    rows = [row(f"{CHAIN}{n})", most, 0.8, 0.5) for n in (3, 6)] + [row("identity", 0, 0.9, 0.0)]
    drawn = comparison_plot({"rows": rows}).decode()
    assert len({name for name in re.findall(r">([^<>]+)</text>", drawn) if "…" in name}) == 2


def test_defences_of_one_cost_stand_beside_each_other() -> None:
    drawn = comparison_plot({"rows": [row("identity", 0, 0.8, 0.5), row("one-step", 1, 0.8, 0.5)]}).decode()
    marked = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+" style="fill: #(?:0072b2|d55e00|ffffff)', drawn)
    assert len(set(marked)) == 4  # two over the cost, one over clean accuracy, which they share, and the legend's
