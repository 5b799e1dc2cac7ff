"""The plots of a robustness report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cmap_defense.common.statistics import Accuracy
from cmap_defense.plots.figure import COLOURS, DASHES, INK, LOGARITHMIC, MARKERS, MUTED, draw, plain_axes, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PURPOSE = "The plots of a report are drawn with matplotlib"

PANEL = (5.0, 3.2)
"""Inches."""


def accuracy_plot(rows: Sequence[tuple[str, Accuracy, Accuracy | None]], predictions: int) -> bytes:
    """An SVG of the accuracy under each attack, with 95 % intervals."""

    def fill(figure: Figure) -> None:
        axes = plain_axes(figure.subplots(), x_label="accuracy")
        axes.grid(visible=False)
        axes.grid(axis="x", color="#dfe3e8")
        columns = [[accuracy for _, accuracy, _ in rows], [vote for _, _, vote in rows]]
        for column, (label, offset) in enumerate((("re-evaluated", -0.14), (f"vote of {predictions}", 0.14))):
            kept = [(y + offset, found) for y, found in enumerate(columns[column]) if found is not None and found.total]
            values = [found.value for _, found in kept]
            ends = [[max(0.0, abs(end - f.value)) for end in f.interval] for _, f in kept]
            colour, face = COLOURS[column], "none" if column else COLOURS[0]
            axes.errorbar(
                values,
                [y for y, _ in kept],
                xerr=list(zip(*ends, strict=True)) if ends else None,
                fmt=MARKERS[column],
                color=colour,
                markerfacecolor=face,
                linewidth=1 if column else 2,
                label=label,
            )
            for y, found in kept:
                place = (1.03 + 0.13 * column, y - offset)
                axes.annotate(f"{found.value:.3f}", place, xycoords=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(rows)), [printable(name, 44) for name, *_ in rows])
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        figure.subplots_adjust(left=0.36, right=0.82, top=1 - 0.4 / height, bottom=0.6 / height)

    height = 1.0 + 0.34 * len(rows)
    return draw((10.0, height), fill, purpose=PURPOSE)


def sweep_plot(
    name: str,
    values: Sequence[float],
    accuracies: Sequence[float],
    errors: Sequence[float],
    *,
    axis: str,
    own: float | None,
    any_image: bool,
) -> bytes:
    """An SVG of accuracy over the steps or the eps of an attack, with standard errors."""
    sizes = name == "eps"
    inner = [value for value in values[: len(values) - any_image] if value > 0]
    whole = sizes and all(abs(value * 255 - round(value * 255)) < 1e-6 for value in inner)
    ticks = [f"{value * 255 if whole else value:.4g}" for value in values]
    places = list(values)
    if sizes:
        places = [-1.0] * (values[0] == 0) + [math.log2(value / inner[0]) for value in inner]
        places += [max(places, default=0.0) + 1.3] * any_image
        ticks = [*ticks[:-1], "any\nimage"] if any_image else ticks

    def fill(figure: Figure) -> None:
        axes = _share_axis(plain_axes(figure.subplots(), x_label=axis + (", in 255ths" if whole else "")))
        labels = [f"{tick}\nas attacked" if value == own else tick for tick, value in zip(ticks, values, strict=True)]
        axes.set_xticks(places, labels)
        axes.errorbar(places, accuracies, errors, fmt="o-", color=COLOURS[0], capsize=3, clip_on=False)
        for x, share, error in zip(places, accuracies, errors, strict=True):
            above = share + error < 0.9
            place = (x, share + error + 0.02 if above else share - error - 0.02)
            axes.annotate(f"{share:.3f}", place, ha="center", va="bottom" if above else "top", color=MUTED, size=8)
        figure.set_layout_engine("constrained")

    return draw(PANEL, fill, purpose=PURPOSE)


def cosine_plot(table: Sequence[Mapping[str, float]]) -> bytes:
    """An SVG of the cosine of two independent averages over the number of gradients in each, with standard errors."""
    counts, cosines, errors = ([row[name] for row in table] for name in ("samples", "cosine", "error"))

    def fill(figure: Figure) -> None:
        axes = plain_axes(figure.subplots(), x_label="gradients in each average", y_label="cosine")
        lowest = min(cosine - error for cosine, error in zip(cosines, errors, strict=True))
        axes.set_ylim(min(0.0, math.floor(lowest * 5) / 5), 1)
        axes.axhline(0, color=MUTED, linewidth=1)
        places = [math.log2(count) for count in counts]
        axes.set_xticks(places, [f"{count:g}" for count in counts])
        axes.errorbar(places, cosines, errors, fmt="o-", color=COLOURS[0], capsize=3)
        figure.set_layout_engine("constrained")

    return draw(PANEL, fill, purpose=PURPOSE)


def curve_plot(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    label: str,
    *,
    share: bool = False,
    prior: float | None = None,
) -> bytes:
    """An SVG of something over the iterations of a purification."""
    values = [value for _, y in lines.values() for value in y] + ([] if prior is None else [prior])

    def fill(figure: Figure) -> None:
        axes = plain_axes(figure.subplots(), label, "iteration")
        if share:
            _share_axis(axes)
        elif prior is None and min(values) > 0 and max(values) > LOGARITHMIC * min(values):
            axes.set_yscale("log")
        if prior is not None:
            axes.axhline(prior, color=MUTED, linewidth=1.2, label=f"prior {prior:g}")
        for number, (name, (x, y)) in enumerate(lines.items()):
            axes.plot(
                list(x),
                y,
                color=INK if number == 0 else COLOURS[(number - 1) % len(COLOURS)],
                linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                markevery=max(1, len(x) // 5),
                label=printable(name, 40),
            )
        axes.legend(frameon=False, fontsize=8)
        figure.set_layout_engine("constrained")

    return draw(PANEL, fill, purpose=PURPOSE)


def _share_axis(axes: Axes) -> Axes:
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylabel("accuracy")
    return axes
