"""What commands print for people: durations, files and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from cmap_defense.common.files import written_whole
from cmap_defense.errors import MissingExtraError
from cmap_defense.plots.figure import COLOURS, INK, MUTED, draw, plain_axes
from cmap_defense.plots.purification import as_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def duration(seconds: float) -> str:
    """In minutes, or in hours where there are many."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes} minute{'s' if minutes > 1 else ''}"


def plural(count: int, noun: str) -> str:
    """So many of something, such as "2 runs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(files: Sequence[Path], lacking: str | None = None, missing: str = "plot") -> str:
    """The files written; what is missing for another, if anything is, goes to standard error."""
    if lacking is not None:
        click.echo(f"No {missing}: {lacking}", err=True)
    return ", ".join(map(str, files))


NEAREST = "purified: of the K images the nearest that agrees with the vote"
"""Which one a sheet shows, for its title."""


def image_sheet(
    columns: Mapping[str, Tensor], captions: Sequence[Sequence[str]], title: str, *, scale: int = 3
) -> Image.Image:
    """A table of images: one column per entry, one row per image, a caption under each."""
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    height, width = (scale * side for side in next(iter(columns.values())).shape[-2:])
    cell_width, cell_height = max(width, 84) + 12, height + 24
    lines = title.split("\n")
    top = 36 + 18 * len(lines)
    size = max(cell_width * len(columns), *(int(font.getlength(line)) for line in lines)) + 24
    sheet = Image.new("RGB", (size, top + 8 + cell_height * len(captions)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((12, 8), title, INK, font)
    for column, (heading, images) in enumerate(columns.items()):
        left = 12 + column * cell_width
        draw.text((left, top - 20), heading, INK, small)
        for row, image in enumerate(F.interpolate(images.float(), scale_factor=scale, mode="nearest")):
            place = top + row * cell_height
            sheet.paste(as_picture(image), (left, place))
            draw.text((left, place + height + 3), captions[row][column], MUTED, small)
    return sheet


def sample_sheet(images: Tensor, *, scale: int = 2, per_row: int = 8) -> Tensor:
    """Images [N, C, H, W] in [0, 1] in rows, one pixel apart, as one image [3, H, W]."""
    enlarged = F.interpolate(images.float(), scale_factor=scale, mode="nearest")
    return make_grid(enlarged, nrow=per_row, padding=1, pad_value=1.0)


def write_line_charts(
    path: Path,
    charts: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    x_label: str,
    *,
    targets: Mapping[str, tuple[str, float]] | None = None,
) -> Path | None:
    """Line charts side by side as a PNG file: heading -> curves: name -> (x, y).

    ``targets``, heading -> (name, value), are marked by a dashed line. Without matplotlib a message on standard error
    and None.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(charts), squeeze=False)[0]
        for axes, (heading, curves) in zip(panels, charts.items(), strict=True):
            plain_axes(axes, heading, x_label)
            for (name, (x, y)), colour in zip(curves.items(), COLOURS, strict=False):
                axes.plot(x, y, color=colour, label=name, marker="o" if len(y) == 1 else None)
            if targets is not None and heading in targets:
                name, value = targets[heading]
                axes.axhline(value, color=INK, linestyle="--", linewidth=1, label=name)
            axes.legend(fontsize="small", frameon=False)
        figure.tight_layout()

    try:
        drawn = draw((4.3 * len(charts), 3.2), fill, purpose=path.name, picture="png", dpi=100)
    except MissingExtraError as error:
        click.echo(f"No {error}", err=True)
        return None
    written_whole(path, lambda partial: partial.write_bytes(drawn))
    return path
