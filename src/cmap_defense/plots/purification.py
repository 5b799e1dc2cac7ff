"""Pictures of a purification: its images in a table, its losses as curves, its course as an animation."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cmap_defense.common.files import written_whole
from cmap_defense.common.paths import expanded
from cmap_defense.errors import InputValueError
from cmap_defense.plots.figure import COLOURS, draw, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def version_grid(images: Tensor, inputs: Tensor | None = None, *, scale: int | None = None) -> Image.Image:
    """A row for each image: the input, where it is given, and its K versions.

    Args:
        images: [B, K, C, H, W] in [0, 1].
        inputs: [B, C, H, W] in [0, 1].
        scale: pixels of the picture per pixel of an image; None for images of about 96 pixels.

    Raises:
        InputValueError: there is no image.
    """
    if not images.numel():
        raise InputValueError("There are no images to show.")
    from torchvision.utils import make_grid  # here, since torchvision takes a second to import

    if inputs is not None:
        images = torch.cat([inputs[:, None].to(images), images], dim=1)
    factor = scale or max(1, round(96 / max(images.shape[-2:])))
    enlarged = F.interpolate(images.detach().cpu().float().flatten(0, 1), scale_factor=factor, mode="nearest")
    return as_picture(make_grid(enlarged, nrow=images.shape[1], padding=2, pad_value=1.0))


def as_picture(image: Tensor) -> Image.Image:
    """An image [C, H, W] in [0, 1] as RGB or grey of 8 bits."""
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def write_animation(frames: Sequence[Image.Image], path: str | Path, *, milliseconds: int = 100) -> Path:
    """Frames of one size as a GIF that repeats; the last one stays for a second."""
    path = expanded(path)
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    small = [frame.quantize(64) for frame in frames]
    options = {"format": "GIF", "save_all": True, "append_images": small[1:], "duration": durations, "loop": 0}
    written_whole(path, lambda partial: small[0].save(partial, **options))
    return path


def history_plot(curves: Mapping[str, Tensor]) -> bytes:
    """The objective, its terms and the moments of the latents over the iterations, means over the images, as PNG.

    Args:
        curves: [N, B] each, by the names of ``History``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    panels = {"objective": ("total", "l1", "ssim", "latent"), "moments of the latents": ("latent_mean", "latent_std")}

    def fill(figure: Figure) -> None:
        for axes, (title, names) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            plain_axes(axes, title, "iteration")
            for name, colour in zip(names, COLOURS, strict=False):
                axes.plot(curves[name].nanmean(dim=1).cpu().tolist(), color=colour, label=name)
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, -0.42), ncols=4, fontsize=8)
        figure.tight_layout()

    return draw((9.0, 3.2), fill, purpose="a plot of the optimisation", picture="png", dpi=100)


def as_html(picture: Image.Image, text: str) -> str:
    """A picture and a text for a notebook."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="purified images"><p>{text}</p>'
