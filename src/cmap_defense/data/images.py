"""Labelled images, in memory or read when they are selected."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cmap_defense.errors import DataError


@runtime_checkable
class ImageSource(Protocol):
    """N labelled images in a fixed order, which may lie on disk until they are selected.

    ``LabelledImages`` is one whose images are all in memory.
    """

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name per class, where they are known."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def select(self, indices: Sequence[int] | Tensor) -> LabelledImages:
        """The images at these positions, in this order, in memory.

        Args:
            indices: integers from 0 to N - 1, or an int64 tensor [M] of them; none, or one several times, is fine.

        Raises:
            DataError: an index is no integer or out of range, or an image cannot be read.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledImages:
    """Labelled images in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        class_names: one per class, where they are known.
        labels_known: False where there are no labels, and all are 0.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None = None
    labels_known: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> LabelledImages:
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def select(self, indices: Sequence[int] | Tensor) -> LabelledImages:
        """A copy of the images at these positions, in this order, with the same class names.

        Args:
            indices: integers from 0 to N - 1, or an int64 tensor [M] of them; none, or one several times, is fine.

        Raises:
            DataError: an index is no integer or out of range.
        """
        chosen = positions_of(indices, len(self))
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen])

    @property
    def unit(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.images.float() / 255


def positions_of(indices: Sequence[int] | Tensor, total: int) -> Tensor:
    """Indices into ``total`` images as int64 [M] on the CPU.

    Raises:
        DataError: one is no integer, or is not from 0 to ``total`` - 1.
    """
    if isinstance(indices, Tensor) and (indices.dtype != torch.int64 or indices.ndim != 1):
        raise DataError(f"Indices must be int64 [M], but are {indices.dtype} {list(indices.shape)}.")
    try:
        listed = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    except TypeError as error:
        raise DataError(f"Indices must be a sequence of integers, but are {indices!r}.") from error
    for index in listed:
        if isinstance(index, bool) or not isinstance(index, numbers.Integral):
            raise DataError(f"Indices must be integers, but there is {index!r} ({type(index).__name__}).")
        if not 0 <= int(index) < total:
            known = f"they go from 0 to {total - 1}" if total else "there are none"
            raise DataError(f"There is no image {index}: {known}.")
    return torch.tensor([int(index) for index in listed], dtype=torch.int64)
