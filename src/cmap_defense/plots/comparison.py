"""The plot of a comparison: accuracy on clean images and under the worst attack, over the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cmap_defense.plots.figure import COLOURS, DASHES, MARKERS, MUTED, draw, plain_axes, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_plot(comparison: Mapping[str, Any]) -> bytes:
    """An SVG: for each defence a line from its accuracy on clean images down to that under the worst attack."""
    rows = comparison["rows"]

    def fill(figure: Figure) -> None:
        axes = plain_axes(figure.subplots(), "Clean (hollow) and under the worst attack (filled)")
        for number, row in enumerate(rows):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            clean, worst = row["clean"]["value"], row["worst"]["value"]
            low, high = row["worst"]["interval"]
            passes = max(1, row["passes"])  # an axis of powers of ten has no 0
            axes.plot([passes, passes], [worst, clean], color=MUTED, linewidth=0.8, zorder=1)
            axes.plot(passes, clean, marker, color=colour, markerfacecolor="white")
            axes.errorbar(
                passes,
                worst,
                yerr=[[max(0.0, worst - low)], [max(0.0, high - worst)]],
                marker=marker,
                color=colour,
                capsize=3,
                linestyle="none",
                label=printable(row["name"], 40),
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("network passes of one prediction of an image, at most")
        axes.set_ylabel("accuracy")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.set_layout_engine("constrained")

    return draw((8.2, 4.2), fill, purpose="The plot of a comparison is drawn with matplotlib")


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
