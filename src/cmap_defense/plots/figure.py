"""What all plots share: colours that colour-blind people can distinguish, and files that are always the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from cmap_defense.common.optional import optional_import
from cmap_defense.common.settings import require_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette."""

MARKERS = "os^DvPX"
DASHES = ("-", "--", ":", "-.")

INK, MUTED, GRID = "#1c2330", "#566070", "#dfe3e8"

LOGARITHMIC = 30.0
"""From this ratio between its ends on, an axis is logarithmic."""


def draw(
    size: tuple[float, float], fill: Callable[[Figure], None], *, purpose: str, picture: str = "svg", dpi: int = 72
) -> bytes:
    """A figure as the bytes of a file; the same content gives the same bytes."""
    require_choice("draw", "picture", picture, ("png", "svg"))
    style = optional_import("matplotlib.style", "report", purpose)
    figures = optional_import("matplotlib.figure", "report", purpose)
    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": "cmap-defense",
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": INK,
    }
    metadata = {"Software": None} if picture == "png" else {"Creator": None, "Date": None}
    with warnings.catch_warnings(), style.context(["default", ours]):
        warnings.filterwarnings("ignore", "Glyph ", UserWarning)  # names in any script: viewers have their own fonts
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        figure = figures.Figure(size, dpi=dpi)
        fill(figure)
        file = io.BytesIO()
        figure.savefig(file, format=picture, metadata=metadata)
    return file.getvalue()


def plain_axes(axes: Axes, title: str = "", x_label: str = "", y_label: str = "") -> Axes:
    """Axes with a grid of their values, and without a frame."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(which="both", length=0, labelcolor=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return axes


def printable(name: str, length: int) -> str:
    """A name in one line of printable characters, its end left out where it is too long."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
