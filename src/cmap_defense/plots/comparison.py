"""The plots of a comparison: accuracy on clean images and under the worst attack, and the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cmap_defense.plots.figure import COLOURS, DASHES, GRID, MARKERS, MUTED, draw, plain_axes, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COST = "network passes of one prediction of an image, at most"


def comparison_plot(comparison: Mapping[str, Any]) -> bytes:
    """An SVG of two plots: for each defence, accuracy under the worst attack over the cost, with that on clean images
    above it; and accuracy under the worst attack over that on clean images."""
    rows = comparison["rows"]
    costs = [max(1, row["passes"]) for row in rows]  # an axis of powers of ten has no 0

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
        over_cost = plain_axes(left, "Clean (hollow), under the worst attack (filled)", COST, "accuracy")
        over_clean = plain_axes(
            right, "Under the worst attack and clean", "accuracy on clean images", "accuracy under the worst attack"
        )
        over_clean.grid(axis="x", color=GRID, linewidth=0.8)
        for number, row in enumerate(rows):
            cycle, place = divmod(number, len(COLOURS))
            colour, marker = COLOURS[place], MARKERS[(place + cycle) % len(MARKERS)]
            clean, worst = row["clean"]["value"], row["worst"]["value"]
            low, high = row["worst"]["interval"]
            beside = costs[:number].count(costs[number])
            passes = costs[number] * 1.06**beside
            over_cost.plot([passes, passes], [worst, clean], color=MUTED, linewidth=0.8, zorder=1)
            over_cost.plot(passes, clean, marker, color=colour, markerfacecolor="white")
            error = [[max(0.0, worst - low)], [max(0.0, high - worst)]]
            style: Any = {"marker": marker, "color": colour, "linestyle": "none"}
            over_cost.errorbar(passes, worst, yerr=error, capsize=3, **style)
            over_clean.plot(clean, worst, label=_short(row["name"]), **style)
        over_cost.set_xscale("log")
        locator: Any = over_cost.xaxis.get_major_locator()
        locator.set_params(subs=(1.0, 2.0, 5.0) if max(costs) < 1000 * min(costs) else (1.0,))
        over_cost.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        over_cost.xaxis.set_minor_formatter(lambda value, _: "")
        over_cost.set_ylim(-0.02, 1.02)
        over_clean.margins(0.12)
        over_clean.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.set_layout_engine("constrained")

    return draw((11.5, 4.2), fill, purpose="The plot of a comparison is drawn with matplotlib")


def _short(name: str) -> str:
    """A name of 44 characters at most: of a longer one both ends, as names of chains often begin alike."""
    shown = printable(name, len(name))
    return shown if len(shown) <= 44 else f"{shown[:24]}…{shown[-19:]}"


def certified_plot(
    curves: Mapping[tuple[str, float], Sequence[float]],
    count: int,
    subtitle: str,
    published: Mapping[str, Mapping[float, float]],
) -> bytes:
    """An SVG: of (denoiser, sigma), a dash and a colour, the radii of the images that are right become the share of
    all ``count`` images that have at least each radius. ``published`` accuracies by name and radius are marked."""
    sigmas, names = sorted({sigma for _, sigma in curves}), list(dict.fromkeys(name for name, _ in curves))
    most = max([0.1, *(radius for radii in (*curves.values(), *published.values()) for radius in radii)])

    def fill(figure: Figure) -> None:
        axes = plain_axes(figure.subplots(), subtitle, "l2 radius, for images in [0, 1]", "certified accuracy")
        for (name, sigma), radii in curves.items():
            right = sorted(radii)
            shares = [(len(right) - place) / count for place in range(len(right))]
            axes.step(
                [0.0, *right, *right[-1:], 1.05 * most],
                [len(right) / count, *shares, 0.0, *([0.0] if right else [])],
                color=COLOURS[sigmas.index(sigma) % len(COLOURS)],
                linestyle=DASHES[names.index(name) % len(DASHES)],
                label=f"{printable(name, 40)}, σ = {sigma:g}",
            )
        for marker, (name, points) in zip(MARKERS, published.items(), strict=False):
            axes.plot(
                list(points), list(points.values()), marker, color=MUTED, markerfacecolor="white",
                label=f"published: {name}",
            )  # fmt: skip
        axes.set_xlim(0, 1.05 * most)
        axes.set_ylim(-0.02, 1.02)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.set_layout_engine("constrained")

    return draw((9.6, 4.2), fill, purpose="The plot of certificates is drawn with matplotlib")
