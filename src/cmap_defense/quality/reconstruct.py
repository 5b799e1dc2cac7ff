"""How near purified images stay to what they were, and how classifiers classify them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks import Attack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.cmap.voting import nearest_voter, vote_logits
from cmap_defense.common.modules import device_of
from cmap_defense.common.rng import derived_seeds
from cmap_defense.common.statistics import Accuracy
from cmap_defense.data.selection import SelectedImages

SHOWN = 8
"""Images that are kept for a picture."""

PURIFIED = 0x9C05E
"""Separates the noise of the purifications from other noise of the same seed."""


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """Of one classifier.

    Attributes:
        clean: bare, on clean images.
        purified: behind the defence, on clean images.
        attacked: bare, on attacked images.
        attacked_purified: behind the defence, on attacked images.
    """

    clean: Accuracy
    purified: Accuracy
    attacked: Accuracy
    attacked_purified: Accuracy

    def to_dict(self) -> dict[str, Any]:
        """As JSON, each with its 95 % interval."""
        return {name: accuracy.to_dict() for name, accuracy in vars(self).items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstructions:
    """Clean and attacked images beside their purified versions.

    Attributes:
        l1: mean absolute difference between clean images and their K purified versions, per pixel and channel, of
            images in [0, 1].
        ssim: mean SSIM of the same pairs.
        images: number of clean images.
        accuracies: by the classifiers' names.
        shown: by "input", "purified", "attacked" and "attacked_purified", the first images [<= 8, C, H, W] in [0, 1] on
            the CPU, of the K purified ones the nearest in L1 among those that are classified as the vote says.
        labels: [<= 8], their true classes.
        predicted: [<= 8] by the same names, classes by the first classifier, of purified images by its vote.
    """

    l1: float
    ssim: float
    images: int
    accuracies: Mapping[str, Accuracies]
    shown: Mapping[str, Tensor]
    labels: Tensor
    predicted: Mapping[str, Tensor]


def reconstruct(
    models: Mapping[str, PurifiedClassifier],
    images: SelectedImages,
    *,
    attack: Attack,
    seed: int,
    group: int,
    on_step: Callable[[str], None],
) -> Reconstructions:
    """Purify clean images once, attack each classifier without its defence, purify what comes of that.

    The noise of an image is a function of the seed and its position in the data, the same for the clean and the
    attacked image and for all classifiers: differences between them are not made of noise.

    Args:
        models: by name, in eval mode, with one backbone and one set of settings. The first purifies the clean images,
            all classify them. Images are in [0, 1].
        images: which, float32 [n, C, H, W].
        attack: made on each bare classifier.
        seed: of the purifications.
        group: images at a time. It changes memory, not the result beyond rounding.
        on_step: called with the name of each part as it begins, and once per latent iteration with "".
    """
    work = _Work(next(iter(models.values())), images, seed, group, on_step)
    on_step("purifying clean images")
    clean = work.purified(next(iter(models.values())), images.images, list(models.values()), near=True)
    accuracies, shown, predicted = {}, {}, {}
    for name, model in models.items():
        on_step(f"attacking {name}")
        attacked = work.attacked(model, attack)
        on_step(f"purifying attacked images for {name}")
        recovered = work.purified(model, attacked, [model], near=False)
        labels = {
            "input": work.bare(model, images.images),
            "purified": clean.predicted[len(accuracies)],
            "attacked": work.bare(model, attacked),
            "attacked_purified": recovered.predicted[0],
        }
        accuracies[name] = Accuracies(*(Accuracy.of(found, images.labels) for found in labels.values()))
        if not shown:
            pictures = (images.images, clean.kept, attacked, recovered.kept)
            shown = {kind: found[:SHOWN].clone() for kind, found in zip(labels, pictures, strict=True)}
            predicted = {kind: found[:SHOWN].clone() for kind, found in labels.items()}
    return Reconstructions(
        l1=clean.l1.mean().item(),
        ssim=clean.ssim.mean().item(),
        images=len(images),
        accuracies=accuracies,
        shown=shown,
        labels=images.labels[:SHOWN].clone(),
        predicted=predicted,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Purified:
    """Of n images: predicted [n] by each classifier, kept [<= 8, C, H, W], l1 and ssim, float64 [n] each or empty."""

    predicted: list[Tensor]
    kept: Tensor
    l1: Tensor
    ssim: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """Everything group by group, from the CPU to the device and back."""

    first: PurifiedClassifier
    images: SelectedImages
    seed: int
    group: int
    on_step: Callable[[str], None]

    def attacked(self, model: PurifiedClassifier, attack: Attack) -> Tensor:
        """The images, attacked through the bare classifier."""
        parts = []
        for rows in self._rows():
            images, labels = (part[rows].to(self._device) for part in (self.images.images, self.images.labels))
            parts.append(attack(model.undefended, images, labels, indices=self.images.positions[rows]).images.cpu())
        return torch.cat(parts)

    def bare(self, model: PurifiedClassifier, images: Tensor) -> Tensor:
        """[n], the classes that the classifier predicts for images that are not purified."""
        with torch.no_grad():
            return torch.cat(
                [model.undefended(images[rows].to(self._device)).argmax(dim=1).cpu() for rows in self._rows()]
            )

    def purified(
        self, model: PurifiedClassifier, images: Tensor, voters: list[PurifiedClassifier], *, near: bool
    ) -> _Purified:
        """Purify by one model and let the classifiers of several vote.

        Args:
            model: purifies.
            images: [n, C, H, W] in [0, 1].
            voters: classify; the first decides which purified images are kept.
            near: measure how near the images stay.
        """
        seeds = derived_seeds(derived_seeds(self.images.positions, PURIFIED), self.seed)
        predicted: list[list[Tensor]] = [[] for _ in voters]
        kept, l1, ssim = [], [], []
        with torch.no_grad(), model.register_latent_hook(lambda state: self.on_step("")):
            for rows in self._rows():
                part = images[rows].to(self._device)
                versions = model.purify(part, seeds=seeds[rows] if model.seed is None else None).images
                logits = [_logits(voter, versions) for voter in voters]
                votes = [
                    vote_logits(found, lift=voter.vote == "label").argmax(dim=1)
                    for found, voter in zip(logits, voters, strict=True)
                ]
                for vote, labels in zip(votes, predicted, strict=True):
                    labels.append(vote.cpu())
                nearest = nearest_voter(part, versions, logits[0], votes[0])
                chosen = versions[torch.arange(len(nearest), device=nearest.device), nearest]
                kept.append(chosen[: max(0, SHOWN - int(rows[0]))].cpu())
                if near:
                    for found, distances in zip((l1, ssim), _nearness(part, versions), strict=True):
                        found.append(distances.double().cpu())
        none = torch.zeros(0, dtype=torch.float64)
        return _Purified(
            [torch.cat(labels) for labels in predicted],
            torch.cat(kept),
            torch.cat(l1) if near else none,
            torch.cat(ssim) if near else none,
        )

    def _rows(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self.images)).split(self.group)

    @property
    def _device(self) -> torch.device:
        return device_of(self.first) or torch.device("cpu")


def _logits(model: PurifiedClassifier, versions: Tensor) -> Tensor:
    """[B, K, classes], the classifier's logits of K versions of each image, [B, K, C, H, W]."""
    return torch.stack([model.undefended(version) for version in versions.unbind(dim=1)], dim=1)


def _nearness(images: Tensor, versions: Tensor) -> tuple[Tensor, Tensor]:
    """L1 per pixel and SSIM, [B] each, means over the K versions [B, K, C, H, W]."""
    reference = SSIMReference.of(images)
    ssim = torch.stack([reference.ssim_sum(version) for version in versions.unbind(dim=1)], dim=1)
    l1 = (versions - images[:, None]).abs().flatten(1).mean(dim=1)
    return l1, ssim.mean(dim=1) / images[0].numel()
