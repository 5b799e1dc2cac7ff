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

from cmap_defense.evaluation.plan import DEFENDED
from cmap_defense.evaluation.store import Store, Unit
from cmap_defense.evaluation.tasks import CONTROL

__all__ = ["DIFFERENCE", "Picture", "Sample", "Samples", "Shown", "class_name", "picture", "samples"]

DIFFERENCE = 10
"""Differences are shown so many times as large, around middle grey."""

LARGEST = 128
"""Larger pictures are reduced to this, so that a page stays a page."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """source: a data URI. alt: in words. width, height: in pixels."""

    source: str
    alt: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """One image, clean or attacked. pictures: by what they show (see :func:`samples`). answer: a class, and right,
    whether it is the image's."""

    pictures: Mapping[str, Picture]
    answer: str
    right: bool


@dataclasses.dataclass(frozen=True)
class Sample:
    """position: in the data set. label: the true class. shown: by attack, the control first."""

    position: int
    label: str
    shown: Mapping[str, Shown]


@dataclasses.dataclass(frozen=True)
class Samples:
    """columns: by attack, the control first, the names of its pictures. rows: one per image."""

    columns: Mapping[str, Sequence[str]]
    rows: Sequence[Sample]


def samples(facts: Mapping[str, Any], store: Store, attacks: Sequence[str], count: int = 6) -> Samples | None:
    """The first images of the first run: clean, and for each attack what it made of them.

    Pictures are "image", "difference" (from the clean image; not of the control) and "purified" (where the model
    purifies). The answer is the first one to that image: where the model purifies, its vote.

    Args:
        facts: what :meth:`Report.to_dict` gives.
        store: the folder of the evaluation.
        attacks: on the defended model, by name.
        count: of images, at most.

    Returns:
        None where the folder does not hold the images.
    """
    protocol, names = facts["settings"]["protocol"], facts["class_names"]
    groups = range(-(-min(count, facts["settings"]["data"]["count"]) // protocol["group"]))
    found = {}
    for attack in (CONTROL, *attacks):
        units = [Unit(f"{DEFENDED}/{attack}", protocol["seeds"][0], group) for group in groups]
        lines, tensors = _first(store, units, count)
        if lines and "images" in tensors:
            found[attack] = lines, tensors
    if CONTROL not in found:
        return None
    clean_lines, clean = found[CONTROL]
    rows = []
    for row, line in enumerate(clean_lines):
        label = class_name(line["label"], names)
        about = f"image {line['image']}, {label}"
        shown = {}
        for attack, (lines, tensors) in found.items():
            answer = lines[row]["answers"][0]
            pictures = {"image": picture(tensors["images"][row], f"{about}: {_words(attack)}")}
            if attack != CONTROL:
                change = (tensors["images"][row] - clean["images"][row]) * DIFFERENCE + 0.5
                pictures["difference"] = picture(change, f"{about}: what {attack} changed, {DIFFERENCE} times")
            if "purified" in tensors:
                taken = f"purified, {_words(attack)}, taken for {class_name(answer, names)}"
                pictures["purified"] = picture(tensors["purified"][row], f"{about}: {taken}")
            shown[attack] = Shown(pictures, class_name(answer, names), answer == line["label"])
        rows.append(Sample(line["image"], label, shown))
    return Samples({attack: list(part.pictures) for attack, part in rows[0].shown.items()}, rows)


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


def _first(store: Store, units: Sequence[Unit], count: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Lines and tensors of the first images; tensors that not all pieces have are left out."""
    if not all(store.done(unit) for unit in units):
        return [], {}
    lines = [line for unit in units for line in store.lines(unit)]
    parts = [store.tensors(unit) for unit in units]
    shared = [name for name in ("images", "purified") if all(name in part for part in parts)]
    return lines[:count], {name: torch.cat([part[name] for part in parts])[:count] for name in shared}


def _words(attack: str) -> str:
    return "clean" if attack == CONTROL else f"attacked by {attack}"
