"""What a purification returns."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from PIL import Image
from torch import Tensor

from cmap_defense.common.convert import to_batch
from cmap_defense.common.inputs import check_images
from cmap_defense.common.paths import expanded
from cmap_defense.errors import InputValueError
from cmap_defense.plots.purification import as_html, as_picture, history_plot, version_grid


@dataclasses.dataclass(frozen=True, repr=False)
class History:
    """The optimisation, iteration by iteration; entry n is the state before step n.

    All [N, B]; NaN once an image has stopped.

    Attributes:
        l1: the L1 distance of eq. 10, mean over the K latents.
        ssim: the SSIM term of eq. 10, mean over the K latents.
        latent: L_d (12).
        total: L (9).
        latent_mean: mean over all elements of an image's latents; the prior has 0.
        latent_std: standard deviation over all elements of an image's latents; the prior has 1.
    """

    l1: Tensor
    ssim: Tensor
    latent: Tensor
    total: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def plot(self) -> Image.Image:
        """The objective, its terms and the moments of the latents over the iterations, means over the images.

        Raises:
            MissingExtraError: matplotlib is not installed (extra report).
        """
        curves = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Image.open(io.BytesIO(history_plot(curves)))

    def __repr__(self) -> str:
        return _shapes(self)


@dataclasses.dataclass(frozen=True, repr=False)
class PurificationResult:
    """K purified versions of each of B images.

    Attributes:
        images: [B, K, C, H, W] in [0, 1], what the classifier is shown (before its normalisation).
        latents: [B, K, C, H, W], the unit latents found.
        history: loss terms and latent moments per iteration; None from a purifier that has no such loop.
        seeds: [B] int64 on the CPU, what the noise was drawn from; None when the caller gave the latents.
        class_labels: [B, K] int64, the class that each latent was generated under; None where the backbone is not
            class-conditional.
        logits: [B, K, classes], the classifier on each purified image.
        votes: [B, classes], how many of the K images are classified so.
        labels: [B], the majority label (eq. 14), or that of the highest mean probability where ``vote="soft"``.
        margin: [B] in [0, 1], the lead of the majority label in shares of the K votes.
        passes: [B] int64, the network passes that each image took, where that depends on the image; None where it is
            what the purifier's ``passes`` says.
        iterations: [B] int64 on the CPU, those that each image made; None from a purifier that has no such loop.

    Logits, votes, labels and margin are None when there was no classifier.
    """

    images: Tensor
    latents: Tensor
    history: History | None = None
    seeds: Tensor | None = None
    class_labels: Tensor | None = None
    logits: Tensor | None = None
    votes: Tensor | None = None
    labels: Tensor | None = None
    margin: Tensor | None = None
    passes: Tensor | None = None
    iterations: Tensor | None = None

    def grid(self, inputs: object = None, *, scale: int | None = None) -> Image.Image:
        """The purified images as a picture: a row for each image, its K versions side by side.

        Args:
            inputs: images in [0, 1] for a first column, such as what was purified, in any form that ``purify`` takes.
            scale: pixels of the picture per pixel of an image; None for images of about 96 pixels.

        Raises:
            InputValueError: there are no images, or the inputs are not as many, or not of that shape.
            InputTypeError: they are no images.
        """
        if inputs is None:
            return version_grid(self.images, scale=scale)
        shape = self.images[:, 0].shape
        first = check_images(to_batch(inputs, shape[1])[0], shape[1])
        if first.shape != shape:
            raise InputValueError(f"inputs must be {list(shape)}, one for each image, but are {list(first.shape)}.")
        return version_grid(self.images, first, scale=scale)

    def plot(self) -> Image.Image:
        """The objective and the moments of the latents over the iterations: ``history.plot()``.

        Raises:
            InputValueError: the purifier had no iterations.
            MissingExtraError: matplotlib is not installed (extra report).
        """
        if self.history is None:
            raise InputValueError("There are no iterations to plot: this purifier optimises no latents, as CMAP does.")
        return self.history.plot()

    def save(self, folder: str | Path) -> list[Path]:
        """Write each purified image as ``<image>-<version>.png``, such as ``0003-0.png``.

        Args:
            folder: is made where it is not there.

        Returns:
            The files.

        Raises:
            InputValueError: it is the name of a picture.
        """
        folder = expanded(folder)
        if folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif"):
            raise InputValueError(
                f"{folder} is the name of a file, but a folder is needed; grid().save(...) writes one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for number, versions in enumerate(self.images.detach().cpu().float()):
            for version, image in enumerate(versions):
                written.append(folder / f"{number:04d}-{version}.png")
                as_picture(image).save(written[-1])
        return written

    def _repr_html_(self) -> str:
        """The picture, for notebooks; of many images the first eight."""
        labels = "" if self.labels is None else f"labels {self.labels[:8].tolist()}"
        return as_html(version_grid(self.images[:8]), labels) if self.images.numel() else repr(self)

    def __repr__(self) -> str:
        return _shapes(self)


def _shapes(result: History | PurificationResult) -> str:
    """The fields of a result with the shapes of tensors in place of their elements, on one line each."""
    shown = []
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        text = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        shown.append(f"  {field.name}: {text}".replace("\n", "\n  "))
    return f"{type(result).__name__}(\n" + "\n".join(shown) + "\n)"
