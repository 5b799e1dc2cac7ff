"""A few images of an evaluation, attacked and purified, as pictures that stand in the page itself."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmap_defense.evaluation.report.report import Report
from cmap_defense.evaluation.results import ResultsFolder, WorkUnit
from cmap_defense.evaluation.tasks import CLEAN, DEFENDED

DIFFERENCE = 10
"""Differences are shown this many times as large, around middle grey."""

LARGEST = 128
"""Larger pictures are reduced to this many pixels, so that a page stays a page."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image in the page: a data URI, what it shows in words, and its size in pixels."""

    source: str
    alt: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image of the data set: by attack, the clean image first, its pictures by what they show (see ``samples``),
    the name of the predicted class and whether it is right.
    """

    position: int
    label: str
    pictures: Mapping[str, Mapping[str, Picture]]
    predicted: Mapping[str, str]
    right: Mapping[str, bool]


def samples(report: Report, folder: ResultsFolder, attacks: Sequence[str], count: int = 6) -> list[Sample]:
    """The first images of the first run: clean, and what each attack made of them.

    Pictures are "image", "difference" (from the clean image) and "purified" (where the model purifies). The prediction
    is the first one for that image: where the model purifies, its vote.

    Returns:
        None of them where the folder does not hold the images.
    """
    protocol, names = report.settings["protocol"], report.class_names
    groups = range(-(-min(count, report.settings["data"]["count"]) // protocol["group"]))
    found = {}
    for attack in (CLEAN, *attacks):
        units = [WorkUnit(f"{DEFENDED}/{attack}", protocol["seeds"][0], group) for group in groups]
        lines, tensors = _first(folder, units, count)
        if lines and "images" in tensors:
            found[attack] = lines, tensors
    if CLEAN not in found:
        return []
    clean_lines, clean = found[CLEAN]
    made = []
    for row, line in enumerate(clean_lines):
        label = class_name(line["label"], names)
        about = f"image {line['image']}, {label}"
        pictures, predicted, right = {}, {}, {}
        for attack, (lines, tensors) in found.items():
            first = lines[row]["predictions"][0]
            words = "clean" if attack == CLEAN else f"attacked by {attack}"
            own = {"image": picture(tensors["images"][row], f"{about}: {words}")}
            if attack != CLEAN:
                change = (tensors["images"][row] - clean["images"][row]) * DIFFERENCE + 0.5
                own["difference"] = picture(change, f"{about}: what {attack} changed, {DIFFERENCE} times")
            if "purified" in tensors:
                text = f"{about}: purified, {words}, predicted {class_name(first, names)}"
                own["purified"] = picture(tensors["purified"][row], text)
            pictures[attack], predicted[attack] = own, class_name(first, names)
            right[attack] = first == line["label"]
        made.append(Sample(line["image"], label, pictures, predicted, right))
    return made


def picture(image: Tensor, alt: str) -> Picture:
    """An image [C, H, W], float in [0, 1] (clamped) or uint8, as PNG; with C other than 1 and 3 the mean over C."""
    values = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if values.shape[0] not in (1, 3):
        values = values.mean(dim=0, keepdim=True)
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    shown = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    shown.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(source, alt, shown.width, shown.height)


def class_name(number: int, names: Sequence[str] | None) -> str:
    """A class by its name, or by its number where that is not known."""
    return names[number] if names is not None and 0 <= number < len(names) else f"class {number}"


def _first(
    folder: ResultsFolder, units: Sequence[WorkUnit], count: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Lines and tensors of the first images; tensors that not all work units have are left out."""
    if not all(folder.done(unit) for unit in units):
        return [], {}
    lines = [line for unit in units for line in folder.lines(unit)]
    parts = [folder.tensors(unit) for unit in units]
    shared = [name for name in ("images", "purified") if all(name in part for part in parts)]
    return lines[:count], {name: torch.cat([part[name] for part in parts])[:count] for name in shared}
