"""The smoothed classifier: what a classifier, behind a denoiser or alone, says most often about noisy copies."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmap_defense.backbones.base import caster, check_backbone
from cmap_defense.backbones.load import load_backbone
from cmap_defense.certification.bounds import ABSTAIN, differing
from cmap_defense.certification.settings import CertificationSettings
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.classifier.cautions import part_in_training_mode, warn_of_probabilities
from cmap_defense.classifier.preprocessing import Normalisation
from cmap_defense.classifier.speed import undefended_logits
from cmap_defense.cmap.memory import default_max_parallel
from cmap_defense.common.describe import describe_module, describe_values
from cmap_defense.common.inputs import (
    check_device,
    check_finite,
    check_images,
    check_indices,
    check_logits,
    check_unit_range,
    conversion_line,
)
from cmap_defense.common.modules import device_of, dtype_of
from cmap_defense.common.options import NamedOptions
from cmap_defense.common.rng import derived_seeds, draw_latents, isolated
from cmap_defense.common.settings import require_number
from cmap_defense.errors import BackboneError, ClassifierError, InputValueError, SettingsError

SELECTION, ESTIMATION, PREDICTION = 0x5E1, 0xE57, 0x93D
"""Separate the noise by which a class is chosen, its probability bounded, and a prediction made."""

PURIFICATION = 0x9BF1
"""Separates the noise of a purified classifier from that of its copies."""

BLOCK = 16
"""Copies whose noise one generator draws, one after the other."""

LARGEST = 256
"""Copies in a batch where nobody says how many."""

COUPLED = 1e-2
"""How far logits may change with the other images of a batch, relative to the largest: by rounding alone."""


class SmoothedClassifier(NamedOptions):
    """g(x): the class that a base classifier gives most often to x + sigma e, e ~ N(0, I) (arXiv 1902.02918).

        smoothed = SmoothedClassifier(my_resnet, "cifar10-edm-small", sigma=0.25)
        smoothed.predict(images)

    The base classifier is denoised smoothing (Salman et al. 2020, arXiv 2003.01908; Carlini et al. 2023, arXiv
    2206.10550): y(x) = argmax C(clip(D(2 x - 1 + 2 sigma e, 2 sigma))), with one evaluation of D. The images with
    noise are never clipped.

    Args:
        classifier: an ``nn.Module`` in eval mode, or a callable, from images [M, C, H, W] in [0, 1] to logits. It may
            be random, but no image of a batch may influence another. A ``PurifiedClassifier`` gets seeds of its own for
            each copy; what lies outside [0, 1] it clamps itself, as a part of the base classifier.
        backbone: D, a consistency model or a denoiser, by name, as a folder, as a Hub id or as a module that has
            ``denoise``. None for no denoiser: the classifier alone under noise. One that is loaded here joins the
            classifier's device.
        sigma: standard deviation of the noise, in units of images in [0, 1].
        normalize: (mean, std), or a transform that has both, applied after D.

    Raises:
        SettingsError: sigma is not above 0, or stronger noise than the backbone was trained for; ``normalize`` together
            with a ``PurifiedClassifier``.
        BackboneError: the backbone has no ``denoise``, or is class-conditional.
        UnknownNameError: there is no backbone of this name.
        BackboneFileError: it cannot be loaded.
    """

    _synonyms: ClassVar[Mapping[str, str]] = {"denoiser": "backbone", "model": "classifier", "scale": "sigma"}

    def __init__(
        self,
        classifier: nn.Module | Callable[[Tensor], Tensor],
        backbone: str | os.PathLike[str] | nn.Module | None,
        sigma: float = 0.25,
        *,
        normalize: Any = None,
    ) -> None:
        if not callable(classifier) or isinstance(classifier, type):
            raise SettingsError(f"A classifier takes images and returns logits, but this is {classifier!r}.")
        if isinstance(classifier, PurifiedClassifier):
            if normalize is not None:
                raise SettingsError(
                    "SmoothedClassifier.normalize is for a classifier that takes normalised images. A "
                    "PurifiedClassifier normalises by itself: leave normalize out."
                )
            classifier = classifier.variant(hooks=True, inputs="unit", out_of_range="clamp")
        if isinstance(backbone, (str, os.PathLike)):
            backbone = load_backbone(backbone).to(device_of(classifier) or "cpu")
        self.classifier, self.normalize = classifier, normalize
        self.backbone = None if backbone is None else _checked(backbone)
        self.sigma = require_number("SmoothedClassifier", "sigma", sigma, above=0.0)
        noise = getattr(self.backbone, "noise", None)
        if noise is not None and 2 * self.sigma > noise.sigma_max:
            raise SettingsError(
                f"SmoothedClassifier.sigma must be at most {noise.sigma_max / 2:g}, half of the strongest noise of the "
                f"backbone, but is {self.sigma:g}."
            )

    def __repr__(self) -> str:
        names = [type(part).__name__ for part in (self.classifier, self.backbone)]
        return f"SmoothedClassifier({names[0]}, {'None' if self.backbone is None else names[1]}, sigma={self.sigma:g})"

    def base_logits(self, noisy: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        """The base classifier: logits [M, classes] of images that have their noise already, differentiable.

        Args:
            noisy: float [M, C, H, W], images in [0, 1] plus noise, not clipped.
            seeds: [M] int64, of a ``PurifiedClassifier``; None for fresh ones.

        Raises:
            BackboneError: the backbone returned NaN or another shape.
            ClassifierError: the classifier returned no logits.
        """
        shown = noisy
        if self.backbone is not None:
            clean = caster(self.backbone, noisy.device, "denoise")(2 * noisy - 1, 2 * self.sigma).to(noisy.dtype)
            if clean.shape != noisy.shape or not torch.isfinite(clean.detach()).all():
                raise BackboneError(
                    f"denoise must return finite images {list(noisy.shape)}, but returned {list(clean.shape)}"
                    f"{' with NaN or inf: use bfloat16 or float32' if clean.shape == noisy.shape else ''}."
                )
            shown = (clean.clamp(-1, 1) + 1) / 2
        if self.normalize is not None:
            shown = self._normalisation(noisy).apply(shown)
        if isinstance(self.classifier, PurifiedClassifier):
            return self.classifier(shown, seeds=seeds)
        dtype = dtype_of(self.classifier)
        outputs = undefended_logits(self.classifier, shown if dtype is None else shown.to(dtype), "the certification")
        logits = check_logits(outputs, len(noisy))
        warn_of_probabilities(self.classifier, outputs)
        return logits

    def predict(
        self,
        images: Tensor,
        *,
        n: int = 1000,
        alpha: float = 0.001,
        batch_size: int | None = None,
        seed: int = 0,
        indices: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The smoothed classifier's prediction (PREDICT of arXiv 1902.02918), int64 [B] on the CPU; -1 where n copies
        cannot distinguish the first two classes.

        Args:
            images: as for ``certify``, whose errors it raises.
            n: noisy copies of each image.
            alpha: the probability, at most, of a class that is not the smoothed classifier's.
            batch_size: as for ``certify``.
            seed: likewise.
            indices: likewise.

        Raises:
            SettingsError: with so few copies every image would be -1, even if all of them agreed.
        """
        settings = CertificationSettings(n=n, alpha=alpha, batch_size=batch_size, seed=seed)
        least = math.ceil(1 - math.log2(alpha))  # 2 / 2^n is the test's p where all agree
        if settings.n < least:
            raise SettingsError(
                f"predict needs n of at least {least} with alpha = {alpha:g}, but n is {n}: with fewer copies no two "
                "classes can be distinguished, even if all copies agree."
            )
        keys = self.keys(self.check(images, indices), seed, PREDICTION)
        size = self.batch_size(images, batch_size)
        classes = self.count_classes(images, size)
        found = torch.zeros((len(images), classes), dtype=torch.int64, device="cpu")
        for row, key in enumerate(keys):
            for first in range(0, settings.n, size):
                found[row] += self.count(images[row], key, first, min(first + size, settings.n), classes)
        return torch.where(differing(found, settings.alpha), found.argmax(dim=1), ABSTAIN)

    def check(self, images: object, indices: Tensor | Sequence[int] | None) -> Tensor:
        """The indices of images, int64 [B] on the CPU, where the images and the classifier are what they should be."""
        shape = None if self.backbone is None else tuple(self.backbone.image_shape)  # pyright: ignore[reportArgumentType]
        images = check_images(images, None if shape is None else shape[0])
        for part in (self.backbone, self.classifier):
            check_device(images, device_of(part))
        check_finite(images)
        check_unit_range(images)
        if not len(images):
            raise InputValueError("There must be one image at least, but the batch is empty.")
        if shape is not None and tuple(images.shape[1:]) != shape:
            hint = conversion_line(images, shape[0]) if tuple(images.shape[2:]) == shape[1:] else ""
            hint = hint or " Take a backbone of that size, or resize the images first."
            raise InputValueError(f"The backbone denoises images {list(shape)}, not {list(images.shape[1:])}.{hint}")
        part = part_in_training_mode(self.classifier)
        if part is not None:
            raise ClassifierError(
                f"The classifier is in training mode ({type(part).__name__}), so that its predictions may depend on "
                "the batch, which voids a certificate. Call classifier.eval() first."
            )
        return check_indices(indices, len(images))

    def keys(self, indices: Tensor, seed: int, stream: int) -> list[int]:
        """What the noise of each image is drawn from, for one purpose."""
        return derived_seeds(derived_seeds(indices, seed), stream).tolist()

    def noise(self, key: int, first: int, last: int, shape: Sequence[int]) -> Tensor:
        """Unit noise [last - first, C, H, W] of copies; each a function of (key, number of the copy) alone."""
        begin = first // BLOCK
        blocks = derived_seeds(torch.arange(begin, -(-last // BLOCK), device="cpu"), key)
        return draw_latents(blocks, BLOCK, shape).flatten(0, 1)[first - begin * BLOCK : last - begin * BLOCK]

    @torch.no_grad()
    def count(self, image: Tensor, key: int, first: int, last: int, classes: int) -> Tensor:
        """How often each class is given to the copies ``first`` to ``last`` of an image [C, H, W]: int64 [classes]."""
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        noisy = image + self.sigma * self.noise(key, first, last, image.shape).to(image)
        seeds = derived_seeds(torch.arange(first, last, device="cpu"), key + PURIFICATION)
        with isolated(key, first):  # of a classifier that draws from torch's generators
            logits = self.base_logits(noisy, seeds=seeds)
        return logits.argmax(dim=1).cpu().bincount(minlength=classes)

    @torch.no_grad()
    def count_classes(self, images: Tensor, batch_size: int) -> int:
        """The number of classes. Raises ``ClassifierError`` where an image of a batch influences another."""
        image = images[0].to(torch.promote_types(images.dtype, torch.float32))
        noisy = image + self.sigma * self.noise(0, 0, 2, image.shape).to(image)
        found = []
        for other in (noisy[1], 1 - noisy[1])[: 1 if batch_size == 1 else 2]:
            batch = noisy[:1] if batch_size == 1 else torch.stack([noisy[0], other])
            with isolated(0):
                found.append(self.base_logits(batch, seeds=torch.arange(len(batch), device="cpu"))[0])
        if (found[0] - found[-1]).abs().nan_to_num().max() > COUPLED * found[0].abs().nan_to_num(posinf=0).max():
            raise ClassifierError(
                "The logits of an image depend on the other images of its batch, so that the noisy copies are not "
                "independent and there is no certificate. Take statistics of the batch out of the classifier and the "
                "purifier (or draw a classifier's random numbers from torch's generators), or give batch_size=1."
            )
        return len(found[0])

    def batch_size(self, images: Tensor, wanted: int | None) -> int:
        """How many copies are computed at the same time."""
        if wanted is not None or self.backbone is None:
            return wanted or LARGEST
        call = caster(self.backbone, images.device, "denoise")
        one = lambda noisy: call(noisy, 2 * self.sigma)  # noqa: E731
        return min(LARGEST, default_max_parallel(one, images.shape[1:], images.device, owner=self.backbone))

    @torch.no_grad()
    def describe(self, images: Tensor) -> dict[str, Any]:
        """What decides about the counts, as JSON: the parts by their weights, and the logits of a grey image."""
        with isolated(0):
            logits = self.base_logits(torch.full_like(images[:1], 0.5).float(), seeds=torch.zeros(1, dtype=torch.int64))
        normalisation = None if self.normalize is None else self._normalisation(images)
        return {
            "classifier": describe_module(self.classifier),
            "backbone": None if self.backbone is None else describe_module(self.backbone),
            "sigma": self.sigma,
            "normalize": None if normalisation is None else [normalisation.mean, normalisation.std],
            "logits": describe_values(logits[0]),
        }

    def _normalisation(self, images: Tensor) -> Normalisation:
        return Normalisation.of(self.normalize, images.shape[1], owner="SmoothedClassifier")


def _checked(backbone: Any) -> nn.Module:
    """The backbone in eval mode, where it denoises without class labels. Raises ``BackboneError`` where not."""
    backbone = check_backbone(backbone, "denoise").eval()
    if getattr(backbone, "num_classes", None) is not None:
        raise BackboneError(
            f"{type(backbone).__name__} is class-conditional, and nobody knows the class of a noisy image: take an "
            "unconditional backbone."
        )
    return backbone
