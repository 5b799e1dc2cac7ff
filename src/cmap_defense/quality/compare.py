"""Samples of a backbone, and two distances between them and real images, each where it can be had."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.classifier.wrapper import sampling
from cmap_defense.common.modules import device_of
from cmap_defense.common.rng import derived_seeds, draw_latents
from cmap_defense.data.selection import SelectedImages
from cmap_defense.data.subset import Subset
from cmap_defense.errors import ClassifierError, DataError, MissingExtraError, SettingsError
from cmap_defense.quality.features import (
    INCEPTION_NUMBERS,
    find_features,
    inception_features,
    inception_file,
    read_features,
)
from cmap_defense.quality.frechet import frechet_distance, too_few

SHOWN = 64
"""Samples that are kept for a picture, at most."""

REAL, SAMPLES = 0x4EA1, 0x5A3B1E
"""Separate the draw of the real images and the latents of the samples from other noise of the same seed."""


def sample_images(
    model: PurifiedClassifier, numbers: Tensor, *, seed: int = 0, size: Sequence[int] | None = None
) -> Tensor:
    """G of unit noise, each image a function of (seed, number) alone: [B, C, H, W] in [0, 1] on the model's device.

    Args:
        model: for its backbone; of one that is class-conditional sample i is of class i modulo their number.
        numbers: int64 [B], which samples.
        seed: of all of them.
        size: (H, W) of the images, where the model resizes; None for the backbone's.
    """
    device = device_of(model) or torch.device("cpu")
    latents = draw_latents(derived_seeds(derived_seeds(numbers, SAMPLES), seed), 1, model.image_shape).to(device)
    classes = getattr(model.backbone, "num_classes", None)
    labels = None if classes is None else (numbers % classes).to(device)[:, None]
    with torch.no_grad():
        return sampling(model).generate(latents, class_labels=labels, size=size)[:, 0]


class SampleComparison:
    """What will be compared; arguments and errors are those of ``QualityRun``.

    Attributes:
        real: int64 [R], positions of real images in the data, shuffled.
        reasons: by "frechet" and "fid", why a distance is not available, or None.
        generated: how many samples are needed.
        steps: how often ``on_step`` is called with "".
    """

    def __init__(
        self, model: PurifiedClassifier, data: Any, *, samples: int, features: str | None, seed: int, group: int
    ) -> None:
        sampling(model)  # raises before any work is done
        self.model, self.data, self.seed, self.group = model, data, seed, group
        total = len(data[0]) if isinstance(data, (tuple, list)) else len(cast(Sized, data))
        count = min(2 * samples, total)
        drawn = Subset(count=count, order="random", seed=int(derived_seeds(torch.tensor([seed]), REAL)) % 2**32)
        self.real = torch.tensor(drawn.indices(total))
        image = SelectedImages.of(data, self.real[:1]).images.to(device_of(model))
        model.preprocessing.to_unit(image, device_of(model))
        self._size = image.shape[2:] if model.preprocessing.resize else None
        self.reasons: dict[str, str | None] = {}
        try:
            self._module = find_features(model, image, features)
            self._numbers = read_features(model, image, self._module).shape[1]
            self.reasons["frechet"] = too_few(count // 2, self._numbers)
        except ClassifierError as error:
            self.reasons["frechet"] = str(error)
        try:
            self._inception = inception_file()
            self.reasons["fid"] = too_few(min(samples, count), INCEPTION_NUMBERS)
            if image.shape[1] not in (1, 3):
                self.reasons["fid"] = f"FID is of images with 1 or 3 channels, but these have {image.shape[1]}."
        except (DataError, MissingExtraError, SettingsError) as error:
            self.reasons["fid"] = str(error)
        sizes = {"frechet": (count // 2, count // 2 * 2), "fid": (samples, count)}
        self._sizes = {name: sizes[name] for name, reason in self.reasons.items() if reason is None}
        self.generated = max([min(SHOWN, samples), *(size for size, _ in self._sizes.values())])
        self.steps = len(self._groups(self.generated)) + len(self._groups(count if self._sizes else 0))

    def run(self, on_step: Callable[[str], None]) -> tuple[dict[str, Any], Tensor]:
        """Generate, read and compare.

        Args:
            on_step: called with a word before each part, and with "" for each group of images.

        Returns:
            The distances as JSON. "frechet" has "samples" (between samples and half of the real images), "halves"
            (between the two halves of the real ones: what chance and their number alone make of it), "images" in each
            set, and "module" and "numbers" of the features. "fid" has "value", "samples", "real" and "source". One
            that is not available is None, and "frechet_reason" or "fid_reason" says why. And the first samples,
            [<= 64, C, H, W] in [0, 1], on the CPU.
        """
        device = device_of(self.model) or torch.device("cpu")
        readers: dict[str, Callable[[Tensor], Tensor]] = {}
        source = ""
        if "frechet" in self._sizes:
            readers["frechet"] = functools.partial(read_features, self.model, module=self._module)
        if "fid" in self._sizes:
            readers["fid"], source = inception_features(self._inception, device)
        found: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in readers}

        def read(kind: int, images: Tensor, before: int) -> None:
            for name, reader in readers.items():
                wanted = self._sizes[name][kind] - before
                if wanted > 0:
                    found[name][kind].append(reader(images[:wanted]))
            on_step("")

        on_step("generating samples")
        shown: list[Tensor] = []
        for numbers in self._groups(self.generated):
            images = sample_images(self.model, numbers, seed=self.seed, size=self._size)
            shown.append(images[: max(0, SHOWN - int(numbers[0]))].cpu())
            read(0, images, int(numbers[0]))
        if readers:
            on_step("reading real images")
            for numbers in self._groups(len(self.real)):
                read(1, SelectedImages.of(self.data, self.real[numbers]).images.to(device), int(numbers[0]))
        features = {name: tuple(torch.cat(parts) for parts in both) for name, both in found.items()}
        distances: dict[str, Any] = {"frechet": None, "fid": None}
        if "frechet" in features:
            samples, real = features["frechet"]
            first, second = real.chunk(2)
            distances["frechet"] = {
                "samples": frechet_distance(samples, first),
                "halves": frechet_distance(second, first),
                "images": len(samples),
                "module": self._module,
                "numbers": self._numbers,
            }
        if "fid" in features:
            samples, real = features["fid"]
            value = frechet_distance(samples, real)
            distances["fid"] = {"value": value, "samples": len(samples), "real": len(real), "source": source}
        return distances | {f"{name}_reason": reason for name, reason in self.reasons.items()}, torch.cat(shown)

    def _groups(self, count: int) -> tuple[Tensor, ...]:
        return torch.arange(count).split(self.group) if count else ()
