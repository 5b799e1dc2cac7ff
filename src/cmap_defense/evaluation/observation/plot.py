"""The picture of an observation: one histogram for each kind of image, below each other, over one axis.

matplotlib is the extra ``[report]``, imported when something is drawn; its settings are put back.
"""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cmap_defense.errors import MissingExtraError
from cmap_defense.evaluation.observation.observe import Observation
from cmap_defense.settings import require_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_observation"]

INK, MUTED, GRID, CLEAN = "#1c2330", "#566070", "#dfe3e8", "#0072B2"

STYLES = {
    "clean": ("clean", "outlined in the rows below", CLEAN),
    "generated": ("generated", "by the backbone, from noise", "#009E73"),
    "noise": ("noisy", "the attack with random signs", "#E69F00"),
    "adversarial": ("adversarial", "made by the attack", "#D55E00"),
    "purified_adversarial": ("adversarial, purified", "what the defence looks at", "#CC79A7"),
    "purified_clean": ("clean, purified", "the same with no attack", "#56B4E9"),
}
"""Name, explanation and colour (of the palette of Okabe and Ito) of each kind. Names and places tell them apart too."""

WIDTH, STEP, HEAD, FOOT = 8.0, 0.82, 0.72, 0.62
"""In inches: of the picture, of one histogram, of what is above and below all of them."""

LEFT, RIGHT = 0.265, 0.79
"""Where the histograms begin and end, in shares of the width."""

LOGARITHMIC = 30.0
"""From this ratio between its ends on, the axis is logarithmic."""

BINS = 40


def draw_observation(observation: Observation, *, picture: str = "png") -> bytes:
    """Histograms of the distances, one row for each kind, the clean one's outline behind each. The fullest bin of each
    kind has full height. The same observation gives the same bytes.

    A dark line marks the median of each kind. On the right is the AUROC of telling the kind from clean images, with its
    95 % interval. The axis is logarithmic where the distances span more than a factor of 30.

    Args:
        observation: what :func:`~cmap_defense.evaluation.observation.observe.observe` gives.
        picture: "png" (1600 pixels wide) or "svg".

    Returns:
        The bytes of the file.

    Raises:
        SettingsError: another kind of file.
        MissingExtraError: matplotlib is not installed.
    """
    require_choice("draw_observation", "picture", picture, ("png", "svg"))
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"The picture of an observation is drawn with matplotlib, which cannot be imported ({error}): "
            "pip install 'cmap-defense[report]'."
        ) from error
    ours = {"svg.hashsalt": "observation", "font.sans-serif": ["DejaVu Sans"], "text.parse_math": False}
    metadata = {"Software": None} if picture == "png" else {"Date": None, "Creator": None}
    file = io.BytesIO()
    with matplotlib.style.context(["default", ours]):
        figure = Figure((WIDTH, HEAD + STEP * len(observation.distances) + FOOT), dpi=200)
        _fill(figure, observation)
        figure.savefig(file, format=picture, metadata=metadata)
    return file.getvalue()


def _fill(figure: Figure, observation: Observation) -> None:
    height = figure.get_figheight()
    values = {name: found.tolist() for name, found in observation.distances.items()}
    edges, logarithmic = _edges([value for found in values.values() for value in found])
    bars = {name: _heights(found, edges) for name, found in values.items()}
    levels, references = len(observation.eps.sigmas), observation.references
    how = f"{len(values['clean'])} images of each kind; T = {levels} noise levels, {references} clean reference images"
    figure.text(0.02, 1 - 0.24 / height, "How far from clean images?", size=13, weight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.52 / height, how, size=8.5, color=MUTED, va="center")
    figure.text(
        RIGHT + 0.02,
        1 - (HEAD + 0.3) / height,
        "AUROC against\nclean, 95 % interval",
        size=8,
        color=MUTED,
        va="center",
        linespacing=1.4,
    )
    for row, name in enumerate(values):
        bottom = height - HEAD - STEP * (row + 1)
        axes = figure.add_axes((LEFT, bottom / height, RIGHT - LEFT, 0.84 * STEP / height), label=name)
        if logarithmic:
            axes.set_xscale("log")
        _histogram(axes, edges, None if name == "clean" else bars["clean"], bars[name], STYLES[name][2])
        axes.plot([observation.summary[name].median] * 2, [0, 1.12], color=INK, linewidth=1.4)
        _words(axes, name, observation)
        _axis(axes, last=row == len(values) - 1, logarithmic=logarithmic)


def _edges(values: Sequence[float]) -> tuple[list[float], bool]:
    """Of the bins of all histograms, and whether they are even in the logarithm."""
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > LOGARITHMIC * low
    if logarithmic:
        low, high = math.log(low), math.log(high)
    room = 0.03 * (high - low) or 0.5
    even = [low - room + (high - low + 2 * room) * i / BINS for i in range(BINS + 1)]
    return [math.exp(edge) for edge in even] if logarithmic else even, logarithmic


def _heights(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Shares of the fullest bin."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect.bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return [count / max(counts) for count in counts]


def _histogram(
    axes: Axes, edges: Sequence[float], clean: Sequence[float] | None, own: Sequence[float], colour: str
) -> None:
    if clean is not None:
        axes.stairs(clean, edges, color=CLEAN, linewidth=0.9, alpha=0.9)
    axes.stairs(own, edges, color=colour, fill=True, alpha=0.8)


def _words(axes: Axes, name: str, observation: Observation) -> None:
    """Name and explanation on the left of a row, its AUROC on the right; the first row says what the line is."""
    title, explanation, _ = STYLES[name]
    place = axes.transAxes
    axes.text(-0.03, 0.46, title, ha="right", size=10.5, weight="bold", color=INK, transform=place)
    axes.text(-0.03, 0.18, explanation, ha="right", size=8, color=MUTED, transform=place)
    area = observation.summary[name].auroc
    if area is None:
        axes.annotate(
            "median", (observation.summary[name].median, 1.12), (4, -1), textcoords="offset points", size=8, color=INK
        )
        return
    low, high = area.interval
    axes.text(1.04, 0.46, f"{area.value:.3f}", size=10.5, weight="bold", color=INK, transform=place)
    axes.text(1.04, 0.18, f"{low:.3f} to {high:.3f}", size=8, color=MUTED, transform=place)


def _axis(axes: Axes, *, last: bool, logarithmic: bool) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED if last else GRID)
    axes.set_ylim(0, 1.25)
    axes.set_yticks([])
    axes.margins(x=0)
    axes.tick_params(which="both", length=3 if last else 0, color=MUTED, labelcolor=MUTED, labelsize=8.5)
    axes.tick_params(which="both", labelbottom=last)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if last:
        axes.set_xlabel(
            "squared MMD between one image's EPS and the references'"
            + (", logarithmic" if logarithmic else "")
            + "  →  further",
            size=9,
            color=INK,
        )
