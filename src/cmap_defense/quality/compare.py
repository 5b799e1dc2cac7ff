"""Samples of a backbone beside real images: two distances between sets, each where it can be had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import device_of
from cmap_defense.common.rng import derived_seeds
from cmap_defense.data.selection import images_at
from cmap_defense.data.subset import Subset
from cmap_defense.errors import ClassifierError, DataError, MissingExtraError, SettingsError
from cmap_defense.quality.features import FeatureLayer, find_features, read_features
from cmap_defense.quality.frechet import frechet_distance, too_few
from cmap_defense.quality.inception import INCEPTION_NUMBERS, inception_features, inception_file
from cmap_defense.quality.samples import sample_images

SHOWN = 64
"""Samples that are kept for a picture, at most."""

REAL = 0x4EA1
"""Separates the draw of the real images from other draws of the same seed."""


@dataclasses.dataclass(frozen=True)
class Frechet:
    """Squared Frechet distances in the features of a classifier.

    Attributes:
        samples: between generated images and half of the real ones.
        halves: between the two halves of the real ones: what chance and their number alone make of it.
        images: number of images in each set.
        layer: which features.
    """

    samples: float
    halves: float
    images: int
    layer: FeatureLayer


@dataclasses.dataclass(frozen=True)
class InceptionDistance:
    """FID.

    Attributes:
        value: the distance.
        samples: number of generated images.
        real: number of real images.
        source: whose features, with the version.
    """

    value: float
    samples: int
    real: int
    source: str


@dataclasses.dataclass(frozen=True, eq=False)
class SampleFigures:
    """Distances between samples and real images.

    Attributes:
        frechet: None where it is not available.
        frechet_reason: why it is not.
        fid: None where it is not available.
        fid_reason: why it is not.
        shown: [<= 64, C, H, W] in [0, 1], the first samples, on the CPU.
    """

    frechet: Frechet | None
    frechet_reason: str | None
    fid: InceptionDistance | None
    fid_reason: str | None
    shown: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class SampleComparison:
    """What will be compared; make it with ``of``, which does all checks, and call ``run``.

    Attributes:
        model: the defended classifier.
        data: the data set.
        samples: number of generated images.
        real: int64 [R], positions of real images in the data, shuffled.
        size: (H, W) of the images.
        layer: whose features the Frechet distance is in; None where it is not available.
        frechet_reason: why it is not.
        inception: file of the weights of FID's network; None where FID is not available.
        fid_reason: why it is not.
        seed: of samples and real images.
        group: images at a time.
    """

    model: PurifiedClassifier
    data: Any
    samples: int
    real: Tensor
    size: tuple[int, int]
    layer: FeatureLayer | None
    frechet_reason: str | None
    inception: Path | None
    fid_reason: str | None
    seed: int
    group: int

    @classmethod
    def of(
        cls, model: PurifiedClassifier, data: Any, *, samples: int, features: str | None, seed: int, group: int
    ) -> SampleComparison:
        """Arguments and errors are those of ``QualityRun``."""
        total = len(data[0]) if isinstance(data, (tuple, list)) else len(cast(Sized, data))
        count = min(2 * samples, total)
        drawn = Subset(count=count, order="random", seed=int(derived_seeds(torch.tensor([seed]), REAL)) % 2**32)
        real = torch.tensor(drawn.indices(total))
        image = images_at(data, real[:1]).images.to(device_of(model))
        model.preprocessing.to_unit(image, device_of(model))
        layer, frechet_reason = None, None
        try:
            layer = find_features(model, image, features)
            frechet_reason = too_few(count // 2, layer.numbers)
        except ClassifierError as error:
            frechet_reason = str(error)
        inception, fid_reason = None, None
        try:
            inception = inception_file()
            fid_reason = too_few(min(samples, count), INCEPTION_NUMBERS)
            if image.shape[1] not in (1, 3):
                fid_reason = f"FID is of images with 1 or 3 channels, but these have {image.shape[1]}."
        except (DataError, MissingExtraError, SettingsError) as error:
            fid_reason = str(error)
        return cls(
            model,
            data,
            samples,
            real,
            (image.shape[2], image.shape[3]),
            layer if frechet_reason is None else None,
            frechet_reason,
            inception if fid_reason is None else None,
            fid_reason,
            seed,
            group,
        )

    @property
    def generated(self) -> int:
        """How many samples are needed."""
        half = len(self.real) // 2
        return max(min(SHOWN, self.samples), half if self.layer else 0, self.samples if self.inception else 0)

    @property
    def steps(self) -> int:
        """How often ``on_step`` is called with ""."""
        read = len(self.real) if self.layer or self.inception else 0
        return len(self._groups(self.generated)) + len(self._groups(read))

    def run(self, on_step: Callable[[str], None]) -> SampleFigures:
        """Generate, read and compare.

        Args:
            on_step: called with a word before each group of images.
        """
        half = len(self.real) // 2
        device = device_of(self.model) or torch.device("cpu")
        inception, source = (None, "") if self.inception is None else inception_features(self.inception, device)
        sizes = {"samples": half, "real": 2 * half}
        features_of: dict[str, list[Tensor]] = {"samples": [], "real": []}
        inception_features_of: dict[str, list[Tensor]] = {"samples": [], "real": []}

        def read(kind: str, images: Tensor, before: int, wanted: int) -> None:
            if self.layer is not None and before < sizes[kind]:
                features_of[kind].append(read_features(self.model, images[: sizes[kind] - before], self.layer))
            if inception is not None and before < wanted:
                inception_features_of[kind].append(inception(images[: wanted - before]))
            on_step("")

        on_step("generating samples")
        shown: list[Tensor] = []
        for numbers in self._groups(self.generated):
            size = self.size if self.model.preprocessing.resize else None
            images = sample_images(self.model, numbers, seed=self.seed, size=size)
            before = int(numbers[0])
            shown.append(images[: max(0, SHOWN - before)].cpu())
            read("samples", images, before, self.samples)
        if self.layer is not None or inception is not None:
            on_step("reading real images")
            for numbers in self._groups(len(self.real)):
                images = images_at(self.data, self.real[numbers]).images.to(device)
                read("real", images, int(numbers[0]), len(self.real))
        return SampleFigures(
            None if self.layer is None else _frechet(features_of, half, self.layer),
            self.frechet_reason,
            None if inception is None else _fid(inception_features_of, source),
            self.fid_reason,
            torch.cat(shown),
        )

    def _groups(self, count: int) -> tuple[Tensor, ...]:
        return torch.arange(count).split(self.group) if count else ()


def _frechet(features_of: dict[str, list[Tensor]], half: int, layer: FeatureLayer) -> Frechet:
    samples, real = (torch.cat(features_of[kind]) for kind in ("samples", "real"))
    first, second = real.split(half)
    return Frechet(frechet_distance(samples, first), frechet_distance(second, first), half, layer)


def _fid(inception_features_of: dict[str, list[Tensor]], source: str) -> InceptionDistance:
    samples, real = (torch.cat(inception_features_of[kind]) for kind in ("samples", "real"))
    return InceptionDistance(frechet_distance(samples, real), len(samples), len(real), source)
