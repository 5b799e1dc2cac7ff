"""How near purified images stay to what they were, and how classifiers classify them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

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


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstructions:
    """Clean and attacked images beside their purified versions.

    Attributes:
        l1: mean absolute difference between clean images and their K purified versions, per pixel and channel, of
            images in [0, 1].
        ssim: mean SSIM of the same pairs.
        accuracies: by the classifiers' names, of "clean" and "attacked" images by the undefended classifier, and of
            "purified" (clean ones) and "attacked_purified" by the defended one.
        shown: by "input", "purified", "attacked" and "attacked_purified", the first images [<= 8, C, H, W] in [0, 1] on
            the CPU, of the K purified ones the nearest in L1 among those that are classified as the vote says.
        labels: [<= 8], their true classes.
        predicted: [<= 8] by the same names, classes by the first classifier, of purified images by its vote.
    """

    l1: float
    ssim: float
    accuracies: Mapping[str, Mapping[str, Accuracy]]
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
        attack: made on each undefended classifier.
        seed: of the purifications.
        group: images at a time. It changes memory, not the result beyond rounding.
        on_step: called with the name of each part as it begins, and once per latent iteration with "".
    """
    first = next(iter(models.values()))
    device = device_of(first) or torch.device("cpu")
    groups = torch.arange(len(images)).split(group)
    seeds = derived_seeds(derived_seeds(images.positions, PURIFIED), seed)

    def undefended(model: PurifiedClassifier, given: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model.undefended(given[rows].to(device)).argmax(dim=1).cpu() for rows in groups])

    def purified(model: PurifiedClassifier, given: Tensor, voters: list[PurifiedClassifier]) -> tuple[Tensor, ...]:
        """Predictions [n] of each voter, the images to show, [n] each L1 and SSIM."""
        found: list[tuple[Tensor, ...]] = []
        with torch.no_grad(), model.register_step_hook(lambda state: on_step("")):
            for rows in groups:
                part = given[rows].to(device)
                versions = model.purify(part, seeds=seeds[rows] if model.seed is None else None).images
                logits = [torch.stack([voter.undefended(v) for v in versions.unbind(1)], dim=1) for voter in voters]
                votes = [
                    vote_logits(own, lift=voter.vote == "label").argmax(dim=1)
                    for own, voter in zip(logits, voters, strict=True)
                ]
                nearest = nearest_voter(part, versions, logits[0], votes[0])
                chosen = versions[torch.arange(len(nearest), device=device), nearest][: max(0, SHOWN - int(rows[0]))]
                reference = SSIMReference.of(part)
                ssim = torch.stack([reference.ssim_sum(v) for v in versions.unbind(1)], dim=1).mean(dim=1)
                l1 = (versions - part[:, None]).abs().flatten(1).mean(dim=1)
                found.append(tuple(t.cpu() for t in (*votes, chosen, l1.double(), ssim.double() / part[0].numel())))
        return tuple(map(torch.cat, zip(*found, strict=True)))

    on_step("purifying clean images")
    *votes, kept, l1, ssim = purified(first, images.images, list(models.values()))
    accuracies, shown, predicted = {}, {}, {}
    for vote, (name, model) in zip(votes, models.items(), strict=True):
        on_step(f"attacking {name}")
        attacked = torch.cat([_attacked(attack, model, images, rows, device) for rows in groups])
        on_step(f"purifying attacked images for {name}")
        recovered, pictures, *_ = purified(model, attacked, [model])
        labels = {"clean": undefended(model, images.images), "purified": vote, "attacked": undefended(model, attacked)}
        labels["attacked_purified"] = recovered
        accuracies[name] = {kind: Accuracy.of(found, images.labels) for kind, found in labels.items()}
        if not shown:
            kinds = ("input", "purified", "attacked", "attacked_purified")
            together = zip(kinds, (images.images, kept, attacked, pictures), labels.values(), strict=True)
            for kind, picture, found in together:
                shown[kind], predicted[kind] = picture[:SHOWN].clone(), found[:SHOWN].clone()
    return Reconstructions(
        l1.mean().item(), ssim.mean().item(), accuracies, shown, images.labels[:SHOWN].clone(), predicted
    )


def _attacked(
    attack: Attack, model: PurifiedClassifier, images: SelectedImages, rows: Tensor, device: torch.device
) -> Tensor:
    """Some of the images, attacked through the undefended classifier, on the CPU."""
    given, labels = images.images[rows].to(device), images.labels[rows].to(device)
    return attack(model.undefended, given, labels, indices=images.positions[rows]).images.cpu()
