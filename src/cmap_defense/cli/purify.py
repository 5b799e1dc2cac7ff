"""``cmap-defense purify``: image files in, purified files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from cmap_defense.cli.build import Printed, backbone_and_purifier, device_of
from cmap_defense.cmap.losses import perceptual_terms
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.common.inputs import check_shape, resize_images
from cmap_defense.common.progress import showing_passes
from cmap_defense.data.files import read_image, write_image
from cmap_defense.data.folders import image_files
from cmap_defense.errors import DataError, InputValueError
from cmap_defense.purifiers import CMAP
from cmap_defense.purifiers.choice import recorded_settings
from cmap_defense.purifiers.names import name_of

GROUP = 64
"""Images at a time."""


def run_purify(options: dict[str, Any]) -> Printed:
    """Carry out the command."""
    device, resize, seed = device_of(options), options["resize"], options["seed"]
    targets = _targets(options["images"], options["out"])
    backbone: Any
    backbone, purifier = backbone_and_purifier(options["backbone"], options)
    _refuse_twice(targets, purifier.n_latents if options["write_all"] else 0)
    settings = purifier.settings if isinstance(purifier, CMAP) else recorded_settings(CMAP().member(backbone))
    label = _class_label(options["class_label"], purifier.member(backbone).num_classes, options["backbone"])
    channels, *size = backbone.image_shape
    for path in targets:  # before any work is done
        _check_size(path, read_image(path, channels), backbone.image_shape, resizes=resize is not None)
    paths = list(targets)
    groups = [paths[start : start + GROUP] for start in range(0, len(paths), GROUP)]
    written, mismatches = [], []
    with showing_passes(purifier.passes * len(paths), "purifying"):
        for group in groups:
            originals = [read_image(path, channels) for path in group]
            batch = torch.cat([resize_images(image[None], size, resize or "bilinear") for image in originals])
            batch = batch.to(device)
            labels = None if label is None else torch.full((len(batch), purifier.n_latents), label, device=device)
            with torch.no_grad():
                seeds = torch.full((len(batch),), seed)
                result = purifier(backbone, batch, seeds=seeds, class_labels=labels)
            mismatch = _mismatch(result.images, batch, settings)
            mismatches += mismatch.amin(dim=1).tolist()
            best = mismatch.argmin(dim=1)
            for i, (path, original) in enumerate(zip(group, originals, strict=True)):
                target = targets[path]
                versions = resize_images(result.images[i], original.shape[-2:], resize or "bilinear")
                written.append(write_image(versions[best[i]], target))
                if options["write_all"]:
                    written += [write_image(v, _version(target, k)) for k, v in enumerate(versions)]
    names = [str(path) for path in written]
    about = {"purifier": name_of(purifier), "settings": purifier.to_dict(), "backbone": options["backbone"]}
    return {"files": names, "mismatch": mismatches, **about, "seed": seed}, names


def _class_label(label: int | None, num_classes: Any, backbone: str | tuple[str, ...]) -> int | None:
    """The class label, or wrong usage where the backbone's number of classes does not allow it."""
    if (label is None) == (num_classes is None) and (label is None or label < (num_classes or 0)):
        return label
    backbone = backbone if isinstance(backbone, str) else " with ".join(backbone)
    remedy = (
        f"the backbone {backbone} is not class-conditional: leave the option out."
        if num_classes is None
        else f"the backbone {backbone} has {num_classes} classes: give a number from 0 to {num_classes - 1}."
    )
    raise click.BadParameter(remedy, param_hint="--class-label")


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


def _version(target: Path, number: int) -> Path:
    """Where a version goes, beside the best one of them."""
    return target.with_stem(f"{target.stem}-{number}")


def _targets(given: Sequence[Path], out: Path) -> dict[Path, Path]:
    """By the path of each image, where its purified version goes."""
    found: dict[Path, Path] = {}
    for path in given:
        if not path.exists():
            raise DataError(f"There is no file or folder {path}: give image files, or folders of them.")
        files = image_files(path) if path.is_dir() else [path]
        if path.resolve() in out.resolve().parents:  # what was written there before is not purified again
            files = [file for file in files if out.resolve() not in file.resolve().parents]
        if not files:
            raise DataError(f"{path} has no image files in it: name another folder, or image files.")
        for file in files:
            name = file.relative_to(path) if path.is_dir() else Path(file.name)
            if file in found:
                raise DataError(_twice(file, found[file]))
            found[file] = out / name.with_suffix(".png")
    return found


def _refuse_twice(targets: Mapping[Path, Path], versions: int) -> None:
    """Raises ``DataError`` where two files would be one, of the best versions and so many others beside each."""
    taken: set[str] = set()
    for file, target in targets.items():
        for place in (target, *(_version(target, number) for number in range(versions))):
            if str(place).casefold() in taken:  # which is the same file on some systems
                raise DataError(_twice(file, place))
            if place.resolve() == file.resolve():
                raise DataError(f"{file} would be overwritten by its purified version. Give another folder with --out.")
            taken.add(str(place).casefold())


def _twice(file: Path, target: Path) -> str:
    return f"{file}: two images would be written to {target}. Purify them into different folders."
