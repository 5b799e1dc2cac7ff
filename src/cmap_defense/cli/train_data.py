"""The images of ``cmap-defense train``, chosen before they are read: a folder's may take minutes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cmap_defense.data import FolderImages, ImageSource, LabelledImages, open_dataset
from cmap_defense.data.subset import Subset
from cmap_defense.errors import DataError

__all__ = ["TrainingSet", "classes_of", "training_set"]


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Of ``source``, the images at ``positions``; ``shape`` (C, H, W) is that of the first. A folder's are not read
    before they are loaded."""

    where: str
    source: ImageSource
    positions: Sequence[int]
    shape: tuple[int, int, int]

    def loaded(self) -> LabelledImages:
        """All of them, in memory."""
        source, positions = self.source, self.positions
        if isinstance(source, LabelledImages) and isinstance(positions, range):
            return source[positions.start : positions.stop]
        return source.select(positions)


def training_set(options: Mapping[str, Any], channels: int | None = None) -> TrainingSet:
    """What --data, --size, --image-channels and --hold-out say.

    Args:
        options: of the command.
        channels: in which the images of a folder are read where the options do not say; None for 3.

    All images but the last ones; or, of a folder, but the first of a random subset, which ``--split train -n`` of the
    other commands looks at: its images come class by class, and the last ones would be a class.
    """
    where, hold_out = options["data"], options["hold_out"]
    source = open_dataset(where, size=options["size"], channels=options["image_channels"])
    if isinstance(source, FolderImages) and source.channels is None:
        source = dataclasses.replace(source, channels=channels)
    total = len(source)
    if total == 0:
        raise DataError(f"{where} holds no images.")
    if hold_out >= total:
        raise DataError(f"--hold-out {hold_out} leaves nothing of the {total} images.")
    positions: Sequence[int] = range(total - hold_out)
    if hold_out and isinstance(source, FolderImages):
        left_out = set(Subset(count=hold_out, order="random").indices(total))
        positions = [position for position in range(total) if position not in left_out]
    channels, height, width = source.select([0]).images.shape[1:]
    return TrainingSet(where, source, positions, (channels, height, width))


def classes_of(data: ImageSource, where: str) -> int:
    """The number of classes of a data set. Raises DataError when there are not two."""
    count = len(data.class_names) if data.class_names is not None else int(data.labels.max()) + 1
    if count < 2:
        raise DataError(f"{where} has no labels of several classes, which --class-conditional needs.")
    return count
