"""``cmap-defense purify``: image files in, purified files out."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor

from cmap_defense.backbones.load import load_backbone
from cmap_defense.cli.output import checked_device, print_json, using_threads
from cmap_defense.cli.progress import Progress
from cmap_defense.cmap.losses import perceptual_terms
from cmap_defense.cmap.optimise import LatentState
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.data.files import read_image, write_image
from cmap_defense.data.folders import image_files
from cmap_defense.errors import DataError, InputValueError
from cmap_defense.inputs import check_shape, resize_images
from cmap_defense.purifiers.cmap import CMAP

__all__ = ["run_purify"]

GROUP = 64
"""Images at a time."""


def run_purify(
    *,
    images: tuple[Path, ...],
    backbone: str,
    latents: int | None,
    iterations: int | None,
    resize: str | None,
    write_all: bool,
    seed: int,
    class_label: int | None,
    threads: int | None,
    device: str,
    out: Path,
    as_json: bool,
) -> None:
    """Carry out the command; the arguments are its options."""
    generator = load_backbone(backbone, kind="consistency").to(checked_device(device))
    settings = CMAPSettings.from_dict(generator.default_settings or {})
    changes = {"n_latents": latents, "iterations": iterations}
    settings = settings.replace(**{name: value for name, value in changes.items() if value is not None})
    channels, *size = generator.image_shape
    targets = _targets(images, out)
    for path in targets:  # before any work is done
        _check_size(path, read_image(path, channels), generator.image_shape, resizes=resize is not None)
    paths = list(targets)
    groups = [paths[start : start + GROUP] for start in range(0, len(paths), GROUP)]
    written, mismatches = [], []
    with using_threads(threads), Progress(settings.iterations * len(groups), "purifying") as progress:

        def on_iteration(state: LatentState) -> None:
            progress.step()

        for group in groups:
            originals = [read_image(path, channels) for path in group]
            batch = torch.cat([resize_images(image[None], size, resize or "bilinear") for image in originals])
            batch = batch.to(device)
            labels = _class_labels(class_label, generator.num_classes, len(batch), settings.n_latents, batch.device)
            seeds = torch.full((len(batch),), seed)
            result = CMAP(settings)(generator, batch, seeds=seeds, class_labels=labels, callback=on_iteration)
            mismatch = _mismatch(result.images, batch, settings)
            mismatches += mismatch.amin(dim=1).tolist()
            best = mismatch.argmin(dim=1)
            for i, (path, original) in enumerate(zip(group, originals, strict=True)):
                target = targets[path]
                versions = resize_images(result.images[i], original.shape[-2:], resize or "bilinear")
                written.append(write_image(versions[best[i]], target))
                if write_all:
                    written += [write_image(v, target.with_stem(f"{target.stem}-{k}")) for k, v in enumerate(versions)]
    if as_json:
        print_json(
            {
                "files": [str(path) for path in written],
                "mismatch": mismatches,
                "settings": settings.to_dict(),
                "backbone": backbone,
                "seed": seed,
            }
        )
        return
    for path in written:
        click.echo(str(path))


def _class_labels(
    label: int | None, num_classes: int | None, count: int, n_latents: int, device: torch.device
) -> Tensor | None:
    """[B, K] of one label, for a class-conditional backbone; wrong usage when there should be one, or not."""
    if (label is None) != (num_classes is None):
        which = "is not class-conditional" if num_classes is None else f"has {num_classes} classes: name one"
        raise click.BadParameter(f"the backbone {which}.", param_hint="--class-label")
    if label is None or num_classes is None:
        return None
    if label >= num_classes:
        raise click.BadParameter(f"must be below {num_classes}, but is {label}.", param_hint="--class-label")
    return torch.full((count, n_latents), label, device=device)


def _check_size(path: Path, image: Tensor, image_shape: tuple[int, int, int], *, resizes: bool) -> None:
    try:
        check_shape(image[None], image_shape, resizes=resizes)
    except InputValueError as error:
        _, height, width = image_shape
        raise DataError(
            f"{path} is {image.shape[1]} x {image.shape[2]}, but the backbone makes {height} x {width} images. "
            "Give --resize bilinear to resize there and back."
        ) from error


def _mismatch(purified: Tensor, images: Tensor, settings: CMAPSettings) -> Tensor:
    """[B, K]: the summand of eq. 10 for each purified image [B, K, C, H, W] in [0, 1]."""
    n_latents = purified.shape[1]
    reference = SSIMReference.of(images.repeat_interleave(n_latents, dim=0))
    l1, ssim = perceptual_terms(2 * purified.flatten(0, 1) - 1, reference)
    return (l1 - settings.ssim_weight * ssim).unflatten(0, (-1, n_latents))


def _targets(given: tuple[Path, ...], out: Path) -> dict[Path, Path]:
    """By the path of each image, where its purified version goes."""
    found: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path in given:
        below = image_files(path) if path.is_dir() else []
        if path.resolve() in out.resolve().parents:  # what was written there before is not purified again
            below = [file for file in below if out.resolve() not in file.resolve().parents]
        if path.is_dir() and not below:
            raise DataError(f"{path} has no image files in it: name another folder, or image files.")
        pairs = [(file, file.relative_to(path)) for file in below] or [(path, Path(path.name))]
        for file, name in pairs:
            target = out / name.with_suffix(".png")
            if target in taken:
                raise DataError(f"{file}: two images would be written to {target}. Purify them into different folders.")
            if target.resolve() == file.resolve():
                raise DataError(f"{file} would be overwritten by its purified version. Give another folder with --out.")
            found[file] = target
            taken.add(target)
    return found
