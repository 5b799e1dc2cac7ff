"""The plot of a detection of adversarial images: one histogram for each kind of image, below each other."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cmap_defense.common.statistics import AUROC
from cmap_defense.plots.figure import COLOURS, GRID, INK, LOGARITHMIC, MUTED, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = {
    "clean": ("clean", "outlined in the rows below", COLOURS[0]),
    "generated": ("generated", "by the backbone, from noise", COLOURS[2]),
    "noise": ("noisy", "the attack with random signs", COLOURS[4]),
    "adversarial": ("adversarial", "made by the attack", COLOURS[1]),
    "purified_adversarial": ("adversarial, purified", "what the classifier is given", COLOURS[3]),
    "purified_clean": ("clean, purified", "the same with no attack", COLOURS[5]),
}
"""Name, explanation and colour of each kind. Names and places distinguish them too."""

WIDTH, ROW, TOP, BOTTOM = 8.0, 0.82, 1.0, 0.62
"""In inches: of the plot, of one histogram, of what is above and below all of them."""

BINS = 40


def distance_plot(
    distances: Mapping[str, Sequence[float]],
    areas: Mapping[str, AUROC | None],
    subtitle: str,
    *,
    picture: str = "svg",
) -> bytes:
    """Histograms of distances, one row for each kind, the clean one's outline behind each. The fullest bin of each
    kind has full height, and a dark line marks its median. The axis is logarithmic where the distances span more than
    a factor of 30.

    Returns:
        The bytes of the file.
    """
    edges, logarithmic = _edges([value for values in distances.values() for value in values])
    heights = {name: _heights(values, edges) for name, values in distances.items()}
    height = TOP + ROW * len(distances) + BOTTOM

    def fill(figure: Figure) -> None:
        figure.text(0.02, 1 - 0.24 / height, "How far from clean images?", size=13, weight="bold", va="center")
        figure.text(0.02, 1 - 0.52 / height, subtitle, size=8.5, color=MUTED, va="center")
        rows = figure.subplots(len(distances), sharex=True, squeeze=False)[:, 0]
        rows[0].annotate(
            "AUROC against\nclean, 95 % interval", (1.04, 1.2), xycoords="axes fraction", color=MUTED, size=8
        )
        for name, axes in zip(distances, rows, strict=True):
            title, explanation, colour = STYLES[name]
            axes.set_label(name)
            if logarithmic:
                axes.set_xscale("log")
            if name != "clean":
                axes.stairs(heights["clean"], edges, color=COLOURS[0], linewidth=0.9)
            axes.stairs(heights[name], edges, color=colour, fill=True, alpha=0.8)
            axes.plot([sorted(distances[name])[(len(distances[name]) - 1) // 2]] * 2, [0, 1.12], color=INK)
            axes.text(-0.03, 0.46, title, ha="right", weight="bold", transform=axes.transAxes)
            axes.text(-0.03, 0.18, explanation, ha="right", size=8, color=MUTED, transform=axes.transAxes)
            area = areas[name]
            if area is not None:
                axes.text(1.04, 0.46, f"{area.value:.3f}", weight="bold", transform=axes.transAxes)
                interval = "{:.3f} to {:.3f}".format(*area.interval)
                axes.text(1.04, 0.18, interval, size=8, color=MUTED, transform=axes.transAxes)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(GRID)
            axes.set_ylim(0, 1.25)
            axes.set_yticks([])
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
        label = "squared MMD between one image's EPS and the references'"
        rows[-1].set_xlabel(label + (", logarithmic" if logarithmic else "") + "  →  further")
        figure.subplots_adjust(0.265, BOTTOM / height, 0.79, 1 - TOP / height, hspace=0.25)

    purpose = "The plot of a detection is drawn with matplotlib"
    return draw((WIDTH, height), fill, purpose=purpose, picture=picture, dpi=200)


def _edges(values: Sequence[float]) -> tuple[list[float], bool]:
    """Of the bins of all histograms, and whether they are even in the logarithm."""
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > LOGARITHMIC * low
    if logarithmic:
        low, high = math.log(low), math.log(high)
    margin = 0.03 * (high - low) or 0.5
    even = [low - margin + (high - low + 2 * margin) * i / BINS for i in range(BINS + 1)]
    return [math.exp(edge) for edge in even] if logarithmic else even, logarithmic


def _heights(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Shares of the fullest bin."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect.bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return [count / max(counts) for count in counts]
