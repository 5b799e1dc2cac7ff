"""Pictures: sheets of images and line charts, drawn with Pillow alone so that the demo needs no plotting library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cmap_defense.data.files import to_pil

__all__ = ["Curve", "chart_row", "image_sheet", "sample_sheet"]

INK, GREY, PAPER, GRID = "#222222", "#777777", "#ffffff", "#e4e4e4"
BLUE, ORANGE = "#1f6fb4", "#d9662b"


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a chart: its name, its values from iteration 0 on, its colour."""

    name: str
    values: Sequence[float]
    colour: str = BLUE


def image_sheet(
    columns: dict[str, Tensor], captions: Sequence[Sequence[str]], title: str, *, scale: int = 3
) -> Image.Image:
    """A table of images: one column per entry, one row per image, a caption under each.

    Args:
        columns: heading -> images [R, C, H, W] in [0, 1], all of one shape.
        captions: R rows of one caption per column; empty for none.
        title: above the table.
        scale: pixels of the sheet per pixel of an image.
    """
    height, width = next(iter(columns.values())).shape[-2:]
    font, small = _font(13), _font(11)
    cell_w, cell_h = max(width * scale, 84) + 12, height * scale + 24
    rows = len(captions)
    longest = font.getlength(title)
    sheet = Image.new("RGB", (max(cell_w * len(columns), int(longest)) + 24, cell_h * rows + 62), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), title, INK, font)
    for c, (heading, images) in enumerate(columns.items()):
        left = 12 + c * cell_w
        draw.text((left, 34), heading, INK, small)
        for r in range(rows):
            top = 54 + r * cell_h
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
    left, right, top, bottom = 58, width - 16, 58, height - 44
    values = [v for curve in curves for v in curve.values] + ([] if target is None else [target])
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    last = max(1, max(len(curve.values) for curve in curves) - 1)

    def at(n: float, value: float) -> tuple[float, float]:
        return left + (right - left) * n / last, bottom - (bottom - top) * (value - low) / (high - low)

    draw.text((left, 8), heading, INK, font)
    for value in ticks:
        y = at(0, value)[1]
        draw.line([(left, y), (right, y)], GRID)
        draw.text((left - 6, y), f"{value:g}", GREY, small, anchor="rm")
    for n in sorted({0, last // 2, last}):
        x = at(n, low)[0]
        draw.text((x, bottom + 6), str(n), GREY, small, anchor="ma")
    draw.text(((left + right) / 2, bottom + 22), x_label, GREY, small, anchor="ma")
    if target is not None:
        y = at(0, target)[1]
        for x in range(left, right, 8):
            draw.line([(x, y), (min(x + 4, right), y)], INK)
    x = float(left)
    for curve in curves:
        draw.line([at(n, v) for n, v in enumerate(curve.values)], curve.colour, width=2)
        draw.line([(x, 40), (x + 16, 40)], curve.colour, width=3)
        draw.text((x + 22, 33), curve.name, INK, small)
        x += 34 + small.getlength(curve.name)
    return picture


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that enclose [low, high]."""
    span = max(high - low, 1e-6)
    step = next(s for e in range(-9, 12) for m in (1, 2, 5) for s in [m * 10.0**e] if span / s <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
