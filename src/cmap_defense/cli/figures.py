"""Pictures: sheets of images and line charts, drawn with Pillow alone so that the demo needs no plotting library."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cmap_defense.data.files import to_pil

__all__ = ["NEAREST", "Curve", "chart_row", "image_sheet", "sample_sheet"]

INK, GREY, PAPER, GRID = "#222222", "#777777", "#ffffff", "#e4e4e4"
BLUE, ORANGE = "#1f6fb4", "#d9662b"

NEAREST = "purified: of the K images the nearest that agrees with the vote"
"""Which one is shown, for titles."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a chart: its name, its values, its colour, and where they lie on the x axis; None: 0, 1, ..."""

    name: str
    values: Sequence[float]
    colour: str = BLUE
    x: Sequence[float] | None = None

    def points(self) -> list[tuple[float, float]]:
        """(x, value) of each."""
        return list(zip(range(len(self.values)) if self.x is None else self.x, self.values, strict=True))


def image_sheet(
    columns: dict[str, Tensor], captions: Sequence[Sequence[str]], title: str, *, scale: int = 3
) -> Image.Image:
    """A table of images: one column per entry, one row per image, a caption under each.

    Args:
        columns: heading -> images [R, C, H, W] in [0, 1], all of one shape.
        captions: R rows of one caption per column; empty for none.
        title: above the table; its lines are kept.
        scale: pixels of the sheet per pixel of an image.
    """
    height, width = next(iter(columns.values())).shape[-2:]
    font, small = _font(13), _font(11)
    cell_w, cell_h = max(width * scale, 84) + 12, height * scale + 24
    rows = len(captions)
    lines = title.split("\n")
    longest, head = max(map(font.getlength, lines)), 18 * (len(lines) - 1)
    sheet = Image.new("RGB", (max(cell_w * len(columns), int(longest)) + 24, cell_h * rows + 62 + head), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((12, 8 + 18 * number), line, INK, font)
    for c, (heading, images) in enumerate(columns.items()):
        left = 12 + c * cell_w
        draw.text((left, 34 + head), heading, INK, small)
        for r in range(rows):
            top = 54 + head + r * cell_h
            enlarged = F.interpolate(images[r : r + 1].float(), scale_factor=scale, mode="nearest")[0]
            sheet.paste(to_pil(enlarged), (left, top))
            draw.text((left, top + height * scale + 3), captions[r][c], GREY, small)
    return sheet


def sample_sheet(images: Tensor, *, scale: int = 2, per_row: int = 8) -> Image.Image:
    """Images [N, C, H, W] in [0, 1] in rows, one pixel apart."""
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    rows = math.ceil(len(images) / per_row)
    sheet = Image.new("RGB", (per_row * (width + 1) + 1, rows * (height + 1) + 1), PAPER)
    for i, image in enumerate(F.interpolate(images.float(), scale_factor=scale, mode="nearest")):
        sheet.paste(to_pil(image), (1 + i % per_row * (width + 1), 1 + i // per_row * (height + 1)))
    return sheet


def chart_row(charts: dict[str, Sequence[Curve]], *, x_label: str, targets: dict[str, float]) -> Image.Image:
    """Line charts side by side, each with its legend.

    Args:
        charts: heading -> its curves.
        x_label: below each chart.
        targets: heading -> a value that is marked by a dashed line.
    """
    width, height = 430, 300
    picture = Image.new("RGB", (width * len(charts), height), PAPER)
    for i, (heading, curves) in enumerate(charts.items()):
        picture.paste(_chart(heading, curves, x_label, targets.get(heading), width, height), (i * width, 0))
    return picture


def _chart(
    heading: str, curves: Sequence[Curve], x_label: str, target: float | None, width: int, height: int
) -> Image.Image:
    picture = Image.new("RGB", (width, height), PAPER)
    draw, font, small = ImageDraw.Draw(picture), _font(13), _font(11)
    values = [v for curve in curves for v in curve.values] + ([] if target is None else [target])
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    names = _labels(ticks)
    left, right = max(58, 14 + math.ceil(max(map(small.getlength, names)))), width - 16
    top, bottom = 58, height - 44
    last = max(1.0, *(x for curve in curves for x, _ in curve.points()))
    places = [x for x in _ticks(0, last, least=1) if x <= last]

    def at(x: float, value: float) -> tuple[float, float]:
        return left + (right - left) * x / last, bottom - (bottom - top) * (value - low) / (high - low)

    draw.text((left, 8), heading, INK, font)
    for value, name in zip(ticks, names, strict=True):
        y = at(0, value)[1]
        draw.line([(left, y), (right, y)], GRID)
        draw.text((left - 6, y), name, GREY, small, anchor="rm")
    for place, name in zip(places, _labels(places), strict=True):
        draw.text((at(place, low)[0], bottom + 6), name, GREY, small, anchor="ma")
    draw.text(((left + right) / 2, bottom + 22), x_label, GREY, small, anchor="ma")
    if target is not None:
        y = at(0, target)[1]
        for x in range(left, right, 8):
            draw.line([(x, y), (min(x + 4, right), y)], INK)
    x = float(left)
    for curve in curves:
        points = [at(*point) for point in curve.points()]
        draw.line(points, curve.colour, width=2)
        if len(points) == 1:
            (across, down) = points[0]
            draw.ellipse([across - 3, down - 3, across + 3, down + 3], fill=curve.colour)
        draw.line([(x, 40), (x + 16, 40)], curve.colour, width=3)
        draw.text((x + 22, 33), curve.name, INK, small)
        x += 34 + small.getlength(curve.name)
    return picture


def _ticks(low: float, high: float, *, least: float = 0.0) -> list[float]:
    """Two to eight round numbers that enclose [low, high], ``least`` apart or more."""
    span = max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-12)
    exponent = math.floor(math.log10(span / 6))
    multiple, power = next(
        (m, e) for e in itertools.count(exponent) for m in (1, 2, 5) if span <= 6 * m * 10.0**e and m * 10.0**e >= least
    )

    def tick(number: int) -> float:
        return number * multiple * 10.0**power if power >= 0 else number * multiple / 10.0**-power

    step = tick(1)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [tick(number) for number in range(first, max(last, first + 1) + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """Ticks as texts that differ from each other, with as many digits as that needs."""
    largest = max(map(abs, ticks))
    kind = "f" if largest == 0 or 1e-3 <= largest < 1e7 else "e"
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    labels: list[str] = []
    for digits in range(18):
        labels = [f"{tick:.{digits}{kind}}" for tick in ticks]
        if all(abs(float(label) - tick) < 0.01 * step for label, tick in zip(labels, ticks, strict=True)):
            break
    return labels


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
