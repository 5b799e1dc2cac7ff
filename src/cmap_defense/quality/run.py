"""The quality of a backbone for purification, without anything that must be downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.attacks import PGD, Attack, ThreatModel
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.classifier.speed import undefended_logits
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.common.describe import description_text
from cmap_defense.common.files import as_json
from cmap_defense.common.modules import device_of, evaluating
from cmap_defense.common.progress import OnProgress, Progress
from cmap_defense.common.settings import require_integer
from cmap_defense.data.selection import SelectedImages, labelled_data
from cmap_defense.data.subset import Subset
from cmap_defense.errors import SettingsError
from cmap_defense.quality.compare import SampleComparison
from cmap_defense.quality.reconstruct import Reconstructions, reconstruct

SAMPLES = 5000
"""Generated images, unless said otherwise. Distances of other numbers cannot be compared with these."""

ATTACKER = "the attacker does not know the defence"


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
    """What was found.

    Attributes:
        backbone: its name.
        classifier: its name.
        distances: between samples and real images, what ``SampleComparison.run`` gives.
        samples: the first of them, [<= 64, C, H, W] in [0, 1], on the CPU.
        reconstructions: figures of the purified images.
        images: number of clean images that were purified.
        settings: of CMAP.
        vote: of the defended classifier.
        attack: on the undefended classifiers.
        seed: of everything.
    """

    backbone: str
    classifier: str
    distances: Mapping[str, Any]
    samples: Tensor
    reconstructions: Reconstructions
    images: int
    settings: CMAPSettings
    vote: str
    attack: Attack
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON, each accuracy with its 95 % interval; "frechet" and "fid" are None where they are not
        available, and "frechet_reason" and "fid_reason" say why."""
        near = self.reconstructions
        return {
            "backbone": self.backbone,
            "classifier": self.classifier,
            **self.distances,
            "reconstructions": {"images": self.images, "l1": near.l1, "ssim": near.ssim},
            "classifiers": as_json(near.accuracies),
            "attack": self.attack_name,
            "attack_settings": description_text(self.attack.to_dict()),
            "attacker": ATTACKER,
            "settings": self.settings.to_dict(),
            "vote": self.vote,
            "seed": self.seed,
            "figures": self.figures(),
        }

    def __repr__(self) -> str:
        frechet, near = self.distances["frechet"], self.reconstructions
        distance = "none" if frechet is None else f"{frechet['samples']:.4g} (halves {frechet['halves']:.4g})"
        shown = "; ".join(f"{name} {found['purified']}" for name, found in near.accuracies.items())
        return (
            f"Quality({self.backbone!r}, Frechet distance {distance}, SSIM {near.ssim:.3f}, purified accuracy: {shown})"
        )

    @property
    def attack_name(self) -> str:
        """The attack in a few words; its settings are in ``to_dict``."""
        steps, threat = getattr(self.attack, "steps", None), self.attack.threat
        return f"{type(self.attack).__name__}{'' if steps is None else f'-{steps}'}, {threat.norm} {threat.eps:.4g}"

    def figures(self, **about: Any) -> dict[str, Any]:
        """For ``figures`` of a ``BackboneRecord``: one entry, "measured".

        Args:
            about: what else should stand there, such as the command and the data.
        """
        frechet, fid, near = self.distances["frechet"], self.distances["fid"], self.reconstructions
        found: dict[str, Any] = {}
        if frechet is not None:
            found[frechet["name"]] = {
                "samples and real images": frechet["samples"],
                "two halves of real images": frechet["halves"],
                "images in each set": frechet["images"],
            }
        if fid is not None:
            sizes = {"samples": fid["samples"], "real images": fid["real"], "by": fid["source"]}
            found["FID"] = {"value": fid["value"], **sizes}
        found["reconstructions"] = {"images": self.images, "mean L1 per pixel": near.l1, "mean SSIM": near.ssim}
        found["accuracy"] = {
            name: {kind.replace("_", ", "): str(accuracy) for kind, accuracy in accuracies.items()}
            for name, accuracies in near.accuracies.items()
        }
        found["attack"] = f"{self.attack_name}, on the undefended classifier: {ATTACKER}"
        found["settings"] = {"n_latents": self.settings.n_latents, "iterations": self.settings.iterations}
        return {"measured": {**about, **_short(found), "seed": self.seed}}


class QualityRun:
    """How good a backbone is: as a generator, and as what images are purified with.

        found = QualityRun(model, load_test_images(), name="embedded", subset=Subset(count=64)).run()
        print(found.to_dict()["frechet"])

    Samples are compared with real images by the Frechet distance in the classifier's own features, which needs no
    network that must be fetched, beside the distance of two halves of the real images; and by FID, where the weights of
    its network are there. Clean images are purified and classified; so are images that were attacked through the
    undefended classifier, which shows how the defence works and not how robust it is.

    Args:
        model: the defended classifier.
        data: as ``SelectedImages.of`` takes it.
        name: of the classifier.
        others: further classifiers by name, images in [0, 1] to logits: they classify the same purified clean images,
            and each has an attack and purifications of its own.
        subset: the images to be purified; None for the first 512.
        samples: generated images. They are compared with real ones drawn from the data by ``seed``, twice as many, in
            two halves of that size; with fewer where the data has no more. FID is between all of both.
        features: name of the classifier's module whose input is the features; None for the last ``nn.Linear``.
        attack: on the undefended classifiers; None for PGD with linf 8/255 and 20 steps.
        seed: of samples, real images, attack and purifications.
        group: images at a time. It changes memory, not the result beyond rounding.

    Raises:
        InputTypeError, InputValueError, DataError: the images are none, or do not fit the model.
        SettingsError: an option is out of its range, or there is no module of that name.
        WrongKindError: the backbone is a denoiser, which has no one-step samples.
    """

    def __init__(
        self,
        model: PurifiedClassifier,
        data: Any,
        *,
        name: str = "classifier",
        others: Mapping[str, nn.Module | Callable[[Tensor], Tensor]] | None = None,
        subset: Subset | None = None,
        samples: int = SAMPLES,
        features: str | None = None,
        attack: Attack | None = None,
        seed: int = 0,
        group: int = 32,
    ) -> None:
        require_integer("QualityRun", "samples", samples, minimum=2)
        require_integer("QualityRun", "seed", seed, minimum=-(2**63), below=2**63)
        require_integer("QualityRun", "group", group, minimum=1)
        if attack is not None and not isinstance(attack, Attack):
            raise SettingsError(f"QualityRun.attack must be an attack such as PGD(ThreatModel()), but is {attack!r}.")
        if name in (others or {}):
            raise SettingsError(f"QualityRun.others must have other names than the classifier, which is {name!r}.")
        self.model = model.on_unit_images()
        self.name, self.seed, self.group = name, seed, group
        self.attack = attack or PGD(ThreatModel(), steps=20, seed=seed)
        self.models = {name: self.model} | {
            other: _beside(self.model, classifier) for other, classifier in (others or {}).items()
        }
        data = labelled_data(data, self.model.image_shape[0])
        self.images = SelectedImages.of(data, subset or Subset(count=512))
        for other, model in self.models.items():
            with torch.no_grad(), evaluating(model):
                logits = undefended_logits(model, self.images.images[:1].to(device_of(model)), other)
            self.images.check_classes(logits.shape[1], other)
        with evaluating(self.model):
            self.comparison = SampleComparison(
                self.model, data, samples=samples, features=features, seed=seed, group=group
            )

    @property
    def passes(self) -> int:
        """Network passes: of the samples, and of the clean images' and each attacked images' purification, which
        generates once per iteration and once more at its end. Those by which a purification finds out what fits, where
        ``max_parallel`` does not say, are not included."""
        settings = self.model.settings
        purified = (1 + len(self.models)) * len(self.images) * settings.n_latents * (settings.iterations + 1)
        return self.comparison.generated + purified

    @property
    def steps(self) -> int:
        """Of ``run``: groups of samples, and latent iterations."""
        groups = -(-len(self.images) // self.group)
        return self.comparison.steps + (1 + len(self.models)) * groups * self.model.settings.iterations

    def run(self, progress: OnProgress = None) -> Quality:
        """Do it all.

        Args:
            progress: True for a bar on standard error, or a function of (done, total): ``steps``.
        """
        record = getattr(self.model.backbone, "record", None)
        with contextlib.ExitStack() as stack:
            for model in self.models.values():
                stack.enter_context(evaluating(model))
            report = stack.enter_context(Progress(self.steps, "quality", wanted=progress)).step
            distances, samples = self.comparison.run(report)
            found = reconstruct(
                self.models, self.images, attack=self.attack, seed=self.seed, group=self.group, on_step=report
            )
        if distances["frechet"] is not None:
            distances["frechet"]["name"] = f"Frechet distance in features of {self.name}"
        return Quality(
            backbone=type(self.model.backbone).__name__ if record is None else record.name,
            classifier=self.name,
            distances=distances,
            samples=samples,
            reconstructions=found,
            images=len(self.images),
            settings=self.model.settings,
            vote=self.model.vote,
            attack=self.attack,
            seed=self.seed,
        )


def _beside(model: PurifiedClassifier, classifier: nn.Module | Callable[[Tensor], Tensor]) -> PurifiedClassifier:
    """Another classifier, of images in [0, 1], behind the same defence."""
    return PurifiedClassifier(
        classifier,
        model.backbone,
        settings=model.settings,
        resize=model.preprocessing.resize,
        vote=model.vote,
        seed=model.seed,
        class_labels=model.class_labels,
        max_parallel=model.max_parallel,
    )


def _short(value: Any) -> Any:
    """JSON with its numbers rounded to four digits."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
