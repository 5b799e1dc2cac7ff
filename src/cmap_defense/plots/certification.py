"""The plot of certificates: certified accuracy over the l2 radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cmap_defense.plots.figure import COLOURS, DASHES, MARKERS, MUTED, draw, plain_axes, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
