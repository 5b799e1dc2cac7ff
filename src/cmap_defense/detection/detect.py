"""Detection of adversarial images (Fig. 1 of arXiv 2412.08394): how far do generated, attacked and purified images lie
from clean ones?

Far is the squared MMD between EPS of one image and EPS of clean reference images. The paper finds generated images
with the clean ones, and adversarial ones far away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks import PGD, Attack, ThreatModel
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.classifier.speed import undefended_logits
from cmap_defense.classifier.wrapper import sampling
from cmap_defense.common.describe import description_text
from cmap_defense.common.files import fields_as_json
from cmap_defense.common.inputs import check_finite, check_images, check_indices, check_unit_range
from cmap_defense.common.modules import evaluating
from cmap_defense.common.progress import OnProgress, Progress
from cmap_defense.common.rng import derived_seeds, draw_latents, draw_uniform
from cmap_defense.common.settings import require_flag, require_integer
from cmap_defense.common.statistics import AUROC, Accuracy
from cmap_defense.common.tables import markdown_table
from cmap_defense.detection.eps import EPS, model_scores
from cmap_defense.detection.mmd import Gaussian, Kernel, mmd_distances, unbiased_mmd2
from cmap_defense.errors import BackboneError, InputTypeError, InputValueError, SettingsError
from cmap_defense.plots.detection import distance_plot

KINDS = ("clean", "generated", "noise", "adversarial", "purified_adversarial", "purified_clean")
"""The kinds of images, in the order in which they are shown."""

STREAMS = {name: 0x0B5E + number for number, name in enumerate((*KINDS, "reference"))}
"""Each kind's EPS has its own noise."""

GENERATED, SIGNS, PURIFIED = 0x6E7, 0x5167, 0x9BF1
"""Separate the latents of generated images, the signs of the noise and the noise of the purifications."""


@dataclasses.dataclass(frozen=True)
class KindSummary:
    """The distances of one kind of image in a few numbers.

    Attributes:
        count: number of images.
        median: of their distances.
        quartiles: 25 % and 75 % of them.
        auroc: of distinguishing it from clean images by its larger distance; None for clean images.
        mmd2: MMD^2_u between the EPS of all of them and of all references; None for a single image.
        accuracy: of the undefended classifier on clean, noise and adversarial images, of the defended one (its vote) on
            purified ones; None for generated ones, which have no label.
    """

    count: int
    median: float
    quartiles: tuple[float, float]
    auroc: AUROC | None
    mmd2: float | None
    accuracy: Accuracy | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the area and the accuracy with their 95 % intervals."""
        return fields_as_json(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """How far each kind of image lies from the references.

    Attributes:
        distances: by kind, float64 [B] on the CPU: the squared MMD of each image from the references. The kinds are
            those of ``KINDS``, without the purified ones where they are not wanted; rows are the images in their
            order.
        summary: by kind.
        references: how many there are.
        eps: the score.
        kernel: by which scores are compared, as JSON.
        attack: what made the adversarial images.
        seed: of the noise.
        largest_change: largest absolute difference between an adversarial image and its clean one.
    """

    distances: Mapping[str, Tensor]
    summary: Mapping[str, KindSummary]
    references: int
    eps: EPS
    kernel: Any
    attack: str
    seed: int
    largest_change: float

    def auroc(self, kind: str, against: str) -> AUROC:
        """How well one kind is distinguished from another by its larger distance."""
        return AUROC.of(self.distances[kind], self.distances[against])

    def differs(self, kind: str) -> bool:
        """Whether images of this kind lie further than clean ones: the interval of their AUROC lies above 0.5."""
        area = self.summary[kind].auroc
        return area is not None and area.interval[0] > 0.5

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON; each area and accuracy with its 95 % interval."""
        kinds = {name: {**s.to_dict(), "distances": self.distances[name].tolist()} for name, s in self.summary.items()}
        plain = {name: getattr(self, name) for name in ("references", "kernel", "attack", "seed", "largest_change")}
        against = self.auroc("adversarial", "noise").to_dict()
        return {"kinds": kinds, "adversarial_against_noise": against, "eps": self.eps.to_dict(), **plain}

    def table(self) -> list[list[str]]:
        """Headings, and a row of text for each kind of image."""
        rows = [["kind", "median", "quartiles", "AUROC against clean", "accuracy"]]
        for name, summary in self.summary.items():
            quartiles = "{:.3f} to {:.3f}".format(*summary.quartiles)
            shares = ["" if share is None else str(share) for share in (summary.auroc, summary.accuracy)]
            rows.append([name.replace("_", " "), f"{summary.median:.3f}", quartiles, *shares])
        return rows

    def _repr_markdown_(self) -> str:
        """The table, which notebooks show formatted."""
        return markdown_table(self.table())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {area}" for name, s in self.summary.items() if (area := s.auroc) is not None)
        return f"Detection({self.summary['clean'].count} images of each kind; AUROC against clean: {shown})"

    def plot(self, picture: str = "svg") -> bytes:
        """Histograms of the distances as the bytes of an "svg" or "png" (1600 pixels wide) file; needs matplotlib."""
        count, levels = self.summary["clean"].count, len(self.eps.sigmas)
        subtitle = f"{count} images of each kind; T = {levels} noise levels, {self.references} clean reference images"
        distances = {name: values.tolist() for name, values in self.distances.items()}
        areas = {name: summary.auroc for name, summary in self.summary.items()}
        return distance_plot(distances, areas, subtitle, picture=picture)


def detect(
    model: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    reference: Tensor,
    attack: Attack | None = None,
    eps: EPS | None = None,
    kernel: Kernel | None = None,
    purify: bool = True,
    indices: Tensor | None = None,
    seed: int = 0,
    max_parallel: int = 64,
    progress: OnProgress = None,
) -> Detection:
    """The distances of clean, generated, noisy, adversarial and purified images from clean references.

        images, labels = load_test_images()
        found = detect(model, images[:64], labels[:64], reference=images[64:192])
        print(found.summary["adversarial"].auroc)

    The kinds: "clean", the images. "generated", G of as many new latents. "adversarial". "noise": the perturbations of
    the adversarial images, each element's with a random sign. That is no attack, but as large, save where it is cut at
    0 and 1. "purified_adversarial" and "purified_clean": the first of the K purified versions.

    Where the backbone is class-conditional, EPS of an image is taken under the class that the model itself chooses for
    it (the first of the K); that of an attacked image may be the attacker's.

    Args:
        model: the defended classifier, in eval mode. Images are in [0, 1] whatever its ``inputs`` say.
        images: float [B, C, H, W] in [0, 1].
        labels: int64 [B].
        reference: float [n, C, H, W] in [0, 1], other clean images; the paper has 500.
        attack: what makes the adversarial images, of the classifier without its defence; None for PGD with linf 8/255
            and 20 steps.
        eps: the score; None for T = 20 levels with this seed.
        kernel: None for a Gaussian one with the median heuristic on the references. Also ``Gaussian`` with a bandwidth,
            and what ``deep_kernel`` gives.
        purify: whether the purified kinds are wanted, which take most of the time.
        indices: [B] integers, which image of the data set each one is; None for 0, 1, ... All noise depends on them.
        seed: of the generated images, the signs, the purifications, the attack and the score where none is given.
        max_parallel: images at a time. It changes memory, not the result beyond rounding.
        progress: True for a bar on standard error, or a function of (done, total): latent iterations.

    Raises:
        InputTypeError, InputValueError: images, references or labels are not as above.
        BackboneError: the backbone has no ``denoise``, or is a denoiser, which generates no images in one step.
        SettingsError: an option is out of its range, or the attack needs the defence.
    """
    require_flag("detect", "purify", purify)
    require_integer("detect", "seed", seed, minimum=-(2**63))
    require_integer("detect", "max_parallel", max_parallel, minimum=1)
    attack = PGD(ThreatModel(), steps=20, seed=seed) if attack is None else attack
    if not isinstance(attack, Attack):
        raise SettingsError(f"detect.attack must be an attack such as PGD(ThreatModel()), but is {attack!r}.")
    if not hasattr(model.backbone, "denoise"):
        raise BackboneError(
            f"EPS needs backbone.denoise(noisy, sigma), but {type(model.backbone).__name__} has none: "
            "use a ConsistencyBackbone."
        )
    _check(images, "images")
    _check(reference, "reference", like=images)
    if len(reference) < 2:
        raise InputValueError(f"There must be 2 reference images at least, but there are {len(reference)}.")
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    if not integers or labels.shape != images.shape[:1]:
        raise InputTypeError(f"labels must be integers [{len(images)}], one for each image, but are {labels!r}.")
    index = check_indices(indices, len(images))
    model = model.on_unit_images()
    sampler = sampling(model)  # before any work is done
    labels, eps = labels.to(images.device), eps or EPS(seed=seed)
    groups = torch.arange(len(images), device="cpu").split(max_parallel)
    steps = 2 * len(groups) * model.settings.iterations if purify else 0

    def seeds(stream: int) -> Tensor:
        return derived_seeds(derived_seeds(index, stream), seed)

    def right(given: Tensor) -> Tensor:
        """[B], whether the undefended classifier is right."""
        return torch.cat([model.undefended(given[rows]).argmax(dim=1) for rows in groups]) == labels

    def purified(given: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """The first of the K versions of each image, and [B], whether the vote is right."""
        shown_to.step(f"purifying {name} images")
        own = derived_seeds(seeds(PURIFIED), STREAMS[name])
        kept, correct = [], []
        with model.register_step_hook(lambda state: shown_to.step()):
            for rows in groups:
                result = model.purify(given[rows], seeds=own[rows] if model.seed is None else None)
                assert result.labels is not None
                kept.append(result.images[:, 0])
                correct.append(result.labels == labels[rows])
        return torch.cat(kept), torch.cat(correct)

    with evaluating(model), Progress(steps, "detect", wanted=progress) as shown_to:
        with torch.no_grad():
            classes = undefended_logits(model, images[:1], "defended").shape[1]
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            low, high = (int(label) for label in labels.aminmax())
            raise InputValueError(
                f"labels must be from 0 to {classes - 1}, the classes of the classifier, but go from {low} to {high}."
            )
        shown_to.step("attacking")
        attacks = [attack(model.undefended, images[rows], labels[rows], indices=index[rows]).images for rows in groups]
        with torch.no_grad():
            shown_to.step("generating")
            shown = {"clean": images, "generated": _generated(sampler, images, seeds(GENERATED), groups)}
            shown |= {"noise": flipped(images, torch.cat(attacks), seeds(SIGNS)), "adversarial": torch.cat(attacks)}
            correct = {name: right(shown[name]) for name in ("clean", "noise", "adversarial")}
            for name in ("adversarial", "clean") if purify else ():
                shown[f"purified_{name}"], correct[f"purified_{name}"] = purified(shown[name], name)
            shown_to.step("measuring distances")
            order = {name: (shown[name], index) for name in KINDS if name in shown}
            order["reference"] = (reference, torch.arange(len(reference), device="cpu"))
            scores = {
                name: model_scores(model, eps, given, derived_seeds(own, STREAMS[name]), max_parallel)
                for name, (given, own) in order.items()
            }
    references = scores.pop("reference")
    kernel = kernel or Gaussian.median(references)
    distances = {name: mmd_distances(kernel, score, references).cpu() for name, score in scores.items()}
    return Detection(
        distances=distances,
        summary={
            name: KindSummary(
                count=len(found),
                median=found.quantile(0.5).item(),
                quartiles=(found.quantile(0.25).item(), found.quantile(0.75).item()),
                auroc=None if name == "clean" else AUROC.of(found, distances["clean"]),
                mmd2=unbiased_mmd2(kernel, scores[name], references).item() if len(found) > 1 else None,
                accuracy=Accuracy.mean(correct[name]) if name in correct else None,
            )
            for name, found in distances.items()
        },
        references=len(reference),
        eps=eps,
        kernel=_described(kernel),
        attack=f"{description_text(attack.to_dict())} on the undefended classifier",
        seed=seed,
        largest_change=(shown["adversarial"] - images).abs().max().item(),
    )


def _generated(model: PurifiedClassifier, images: Tensor, seeds: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """As many images of the backbone's as there are images, of the same size and classes."""
    latents = draw_latents(seeds, 1, model.image_shape).to(images.device)
    size, parts = images.shape[2:] if model.preprocessing.resize else None, []
    for rows in groups:
        conditions = model.latent_class_labels(images[rows])
        own = None if conditions is None else conditions[:, :1]
        parts.append(model.generate(latents[rows], class_labels=own, size=size)[:, 0])
    return torch.cat(parts)


def flipped(images: Tensor, adversarial: Tensor, seeds: Tensor) -> Tensor:
    """The perturbations with random signs, added to the images."""
    signs = torch.where(draw_uniform(seeds, images.shape[1:]) < 0.5, -1.0, 1.0)
    return (images + signs.to(images) * (adversarial - images)).clamp(0, 1)


def _check(given: object, name: str, *, like: Tensor | None = None) -> None:
    """Raises InputTypeError or InputValueError unless ``given`` are images in [0, 1], and fit those before them."""
    try:
        found = check_images(given)
        check_finite(found)
        check_unit_range(found)
    except (InputTypeError, InputValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    if not len(found):
        raise InputValueError(f"{name}: there must be one image at least.")
    if like is not None and found.shape[1:] != like.shape[1:]:
        raise InputValueError(f"{name} must be images of {list(like.shape[1:])}, but are {list(found.shape[1:])}.")


def _described(kernel: Any) -> Any:
    """A kernel as JSON."""
    described = kernel.to_dict() if hasattr(kernel, "to_dict") else {"name": repr(kernel)}
    return {"name": "gaussian", **described} if isinstance(kernel, Gaussian) else described
