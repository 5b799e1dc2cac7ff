"""The plots of a report's page: SVG to stand in HTML, in the page's colours and font.

Each draws what it is given and computes nothing. What colours tell is told by shapes as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cmap_defense.evaluation.report.svg import colour_of, drawn, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bar", "Bars", "Line", "accuracies", "averaging", "course", "key", "sweep"]

STYLES = (("ink", "-", "o"), ("series-1", (0, (5, 2)), "s"), ("series-2", (0, (1, 1.5)), "^"), ("series-3", "-.", "D"))
"""Colour, dashes and marker of the first, second ... line of a plot."""

TEXT, SMALL, TINY = 11.5, 10.5, 9.5
"""Sizes of text, in units of a plot: about a pixel of the screen."""

PANEL = (360.0, 232.0)
"""Size of all plots but the widest."""

LOGARITHMIC = 30.0
"""From this ratio between its ends on, the axis of a loss is logarithmic."""

DOTS = (0, (1, 2))


@dataclasses.dataclass(frozen=True)
class Bar:
    """A line of :func:`accuracies`; answers and vote as accuracies are in the JSON of a report, vote None for none.
    marker: of the answers."""

    name: str
    answers: Mapping[str, Any]
    vote: Mapping[str, Any] | None
    marker: str = "o"


@dataclasses.dataclass(frozen=True)
class Bars:
    """Lines that belong together, under a title."""

    title: str
    bars: Sequence[Bar]


@dataclasses.dataclass(frozen=True)
class Line:
    """x, y: of one length. number: which of the styles it is drawn in."""

    x: Sequence[float]
    y: Sequence[float]
    number: int = 0


def accuracies(groups: Sequence[Bars], votes: int, *, narrow: bool, title: str, description: str) -> str:
    """Dots and whiskers for each attack: re-purified (filled, thick whisker) and vote (open square, thin whisker).

    Args:
        groups: from top to bottom.
        votes: N of the vote.
        narrow: for a phone, with each name above its line.
        title, description: for those who do not see it.
    """
    width, left, right = (360.0, 8.0, 352.0) if narrow else (760.0, 214.0, 604.0)
    columns = (254.0, 352.0) if narrow else (668.0, 756.0)
    step, gap, head = (38.0, 28.0, 26.0) if narrow else (26.0, 34.0, 30.0)
    height = head + sum(gap + step * len(group.bars) for group in groups) + 28.0

    def draw(figure: Figure) -> None:
        pad = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        pad.set_axis_off()
        bottom = height - 24.0
        for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            x = left + share * (right - left)
            pad.plot([x, x], [head, bottom], color=colour_of("grid"), linewidth=1, zorder=0)
            side = {0.0: "left", 1.0: "right"}.get(share, "center") if narrow else "center"
            pad.text(x, bottom + 12, f"{share:g}", ha=side, va="center", color=colour_of("muted"), size=SMALL)
        _heads(pad, columns, head / 2, votes)
        y = head
        for group in groups:
            pad.text(8, y + gap - 13, shortened(group.title, 40), va="center", weight="bold", size=TEXT)
            y += gap
            for bar in group.bars:
                name, where = (y + 10, y + 26) if narrow else (y + step / 2, y + step / 2)
                _values(pad, bar, columns, name)
                pad.text(8, name, shortened(bar.name, 40 if narrow else 31), va="center", size=TEXT)
                _whisker(pad, bar.answers, where - 3.5, (left, right), bar.marker, filled=True)
                if bar.vote is not None:
                    _whisker(pad, bar.vote, where + 4.5, (left, right), "s", filled=False)
                y += step

    return drawn(f"accuracies-{'narrow' if narrow else 'wide'}", (width, height), title, description, draw)


def sweep(
    facts: Mapping[str, Any], *, any_image: bool, own: float | None, axis: str, title: str, description: str
) -> str:
    """Accuracy over steps or eps, with standard errors.

    Args:
        facts: of one sweep: "name", "values", "accuracies", "errors". The axis of eps is logarithmic between 0 and the
            size that allows every image.
        any_image: whether the last value is that one.
        own: the value that the attacks themselves have, to be marked; None for none.
        axis: its name.
        title, description: for those who do not see it.
    """
    values, shares, errors = facts["values"], facts["accuracies"], facts["errors"]
    sizes = facts["name"] == "eps"
    whole = sizes and all(abs(value * 255 - round(value * 255)) < 1e-6 for value in values[: len(values) - any_image])
    names = [f"{value * 255 if whole else value:.4g}" for value in values]
    places, names = _sizes(values, names, any_image) if sizes else (list(values), names)
    inner = slice(int(sizes and values[0] == 0), len(values) - int(any_image))

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "accuracy")
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.set_xticks(places, [f"{n}\nas attacked" if v == own else n for n, v in zip(names, values, strict=True)])
        span = max(places) - min(places) or 1.0
        axes.set_xlim(min(places) - 0.07 * span, max(places) + 0.07 * span)
        axes.set_xlabel(axis + (", in 255ths" if whole else ""))
        ink = colour_of("series-1")
        axes.plot(places, shares, color=ink, linewidth=1.2, linestyle=DOTS, clip_on=False)
        axes.plot(places[inner], shares[inner], color=ink, linewidth=1.6, clip_on=False)
        axes.errorbar(places, shares, errors, fmt="o", color=ink, markersize=5, elinewidth=1.3, capsize=3)
        for x, share, error in zip(places, shares, errors, strict=True):
            up = share + error < 0.9
            axes.annotate(
                f"{share:.3f}",
                (x, share + error if up else share - error),
                (0, 4 if up else -4),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                size=TINY,
                color=colour_of("muted"),
                annotation_clip=False,
            )
        for before, after in ((0, 1),) * inner.start + ((-2, -1),) * any_image:
            middle = (places[before] + places[after]) / 2
            axes.text(middle, 0, "//", ha="center", va="center", color=colour_of("muted"), size=TEXT)

    return drawn(f"sweep-{facts['name']}", PANEL, title, description, draw)


def averaging(table: Sequence[Mapping[str, float]], *, title: str, description: str) -> str:
    """The cosine of two independent averages over the number of gradients in each, with standard errors.

    Args:
        table: "samples", "cosine" and "error" in each row.
        title, description: for those who do not see it.
    """
    counts, cosines, errors = ([row[name] for row in table] for name in ("samples", "cosine", "error"))

    def draw(figure: Figure) -> None:
        axes = _axes(figure, "cosine")
        lowest = min(cosine - error for cosine, error in zip(cosines, errors, strict=True))
        axes.set_ylim(min(0.0, math.floor(lowest * 5) / 5), 1)
        axes.axhline(0, color=colour_of("muted"), linewidth=1)
        places = [math.log2(count) for count in counts]
        axes.set_xticks(places, [f"{count:g}" for count in counts])
        axes.set_xlim(min(places) - 0.4, max(places) + 0.4)
        axes.set_xlabel("gradients in each average")
        ink = colour_of("series-1")
        axes.errorbar(places, cosines, errors, fmt="o-", color=ink, lw=1.6, markersize=5, elinewidth=1.3, capsize=3)

    return drawn("averaging", PANEL, title, description, draw)


def course(
    lines: Sequence[Line],
    name: str,
    axis: str,
    *,
    share: bool = False,
    prior: float | None = None,
    title: str,
    description: str,
) -> str:
    """Something over the iterations of a purification.

    Args:
        lines: one at least.
        name: a word of its own among the plots of a page.
        axis: what it is.
        share: whether the axis is from 0 to 1.
        prior: a value to be marked as the prior's.
        title, description: for those who do not see it.
    """
    found = [value for line in lines for value in line.y] + ([] if prior is None else [prior])

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, ScalarFormatter

        axes = _axes(figure, axis)
        if share:
            axes.set_ylim(0, 1)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        elif prior is None and min(found) > 0 and max(found) > LOGARITHMIC * min(found):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            room = 0.08 * (max(found) - min(found)) or 0.5
            axes.set_ylim(min(found) - room, max(found) + room)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            plain = ScalarFormatter(useOffset=False)  # as many digits as tell the ticks apart
            plain.set_scientific(False)
            axes.yaxis.set_major_formatter(plain)
        if prior is not None:
            axes.axhline(prior, color=colour_of("muted"), linewidth=1.2, zorder=0)
            axes.annotate(
                f"prior {prior:g}", (1, prior), (0, 3), axes.get_yaxis_transform(), "offset points", ha="right",
                size=TINY, color=colour_of("muted"), annotation_clip=False,
            )  # fmt: skip
        for line in lines:
            _line(axes, line)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("iteration")

    return drawn(f"course-{name}", PANEL, title, description, draw)


def key(number: int) -> str:
    """A short piece of a line in one of the styles, for the key beside a name."""

    def draw(figure: Figure) -> None:
        pad = figure.add_axes((0, 0, 1, 1), xlim=(0, 40), ylim=(0, 14))
        pad.set_axis_off()
        colour, dashes, marker = STYLES[number]
        pad.plot([1, 39], [7, 7], color=colour_of(colour), linestyle=dashes, linewidth=1.8)
        pad.plot([20], [7], color=colour_of(colour), marker=marker, markersize=6)

    return drawn(f"key-{number}", (40.0, 14.0), None, None, draw)


def _whisker(
    pad: Axes, value: Mapping[str, Any], y: float, ends: tuple[float, float], marker: str, *, filled: bool
) -> None:
    if value["value"] is None:
        return
    low, high, middle = (ends[0] + share * (ends[1] - ends[0]) for share in (*value["interval"], value["value"]))
    colour = colour_of("series-1" if filled else "series-2")
    pad.plot([low, high], [y, y], color=colour, linewidth=2.2 if filled else 1, solid_capstyle="butt")
    _marker(pad, middle, y, marker, filled=filled)


def _values(pad: Axes, bar: Bar, columns: tuple[float, float], y: float) -> None:
    for x, value in zip(columns, (bar.answers, bar.vote), strict=True):
        if value is not None and value["value"] is not None:
            pad.text(x, y, f"{value['value']:.3f}", ha="right", va="center", size=SMALL)


def _heads(pad: Axes, columns: tuple[float, float], y: float, votes: int) -> None:
    """Names of the two measures above the columns of their values, each after its marker."""
    for x, name, filled in ((columns[0], "re-purified", True), (columns[1], f"vote of {votes}", False)):
        pad.text(x, y, name, ha="right", va="center", size=SMALL, color=colour_of("muted"))
        _marker(pad, x - 5.6 * len(name) - 8, y, "o" if filled else "s", filled=filled)


def _marker(pad: Axes, x: float, y: float, marker: str, *, filled: bool) -> None:
    colour = colour_of("series-1" if filled else "series-2")
    face = colour if filled else colour_of("paper")
    pad.plot([x], [y], marker=marker, markersize=7 if filled else 6, color=colour, markerfacecolor=face, mew=1.3)


def _line(axes: Axes, line: Line) -> None:
    colour, dashes, marker = STYLES[line.number % len(STYLES)]
    every = max(1, len(line.x) // 5)
    start = min(line.number * every // len(STYLES), len(line.x) - 1)
    axes.plot(
        line.x, line.y, color=colour_of(colour), linestyle=dashes, linewidth=1.6, marker=marker, markersize=4.5,
        markevery=(start, every), clip_on=False,
    )  # fmt: skip


def _sizes(values: Sequence[float], names: Sequence[str], any_image: bool) -> tuple[list[float], list[str]]:
    """Places and names of attack sizes on a logarithmic axis, 0 before them and every image after them."""
    inner = [value for value in values[: len(values) - any_image] if value > 0]
    places = [-1.0] * (values[0] == 0) + [math.log2(value / inner[0]) for value in inner]
    if not any_image:
        return places, list(names)
    return [*places, max(places, default=0.0) + 1.3], [*names[:-1], "any\nimage"]


def _axes(figure: Figure, what: str) -> Axes:
    """Axes of a panel: a grid of its values, their name above them."""
    width, height = PANEL
    axes = figure.add_axes((46 / width, 50 / height, (width - 60) / width, (height - 82) / height))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour_of("muted"))
    axes.tick_params(which="both", length=0, labelsize=SMALL, labelcolor=colour_of("muted"), pad=5)
    axes.grid(axis="y", color=colour_of("grid"), linewidth=1)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(size=SMALL, color=colour_of("ink"))
    figure.text(4 / width, 1 - 12 / height, what, va="center", size=SMALL, color=colour_of("ink"))
    return axes
