"""What is done with each group of images, and the list of it: clean images, attacks, and what the checks need."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks import PGD, Attack, Goal
from cmap_defense.attacks.oracle import Model, Oracle
from cmap_defense.attacks.steps import random_point
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.inputs import usable
from cmap_defense.common.rng import derived_seeds, isolated
from cmap_defense.errors import GradientWarning, SettingsError
from cmap_defense.evaluation.predictions import predict
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.gradients import StraightThrough

DEFENDED, UNDEFENDED = "defended", "undefended"
"""Names of the model that is evaluated, and of its classifier without the defence."""

CLEAN = "clean"
"""Name of the clean images among the attacks."""

CHECKS = "checks"
"""Stands before the names of the tasks that only the checks need."""

EPS_FACTORS = (0.25, 0.5, 2.0, 4.0)
"""Sizes of the attack next to eps itself, for accuracy over eps."""

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """The images of a group in a run, [B, C, H, W] in [0, 1], and their labels, on the model's device; and on the CPU
    their positions in the data set and the noise indices of the run.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    indices: Tensor

    def lines(self) -> list[Line]:
        """The beginning of each image's line."""
        pairs = zip(self.positions.tolist(), self.labels.tolist(), strict=True)
        return [{"image": position, "label": label} for position, label in pairs]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Task(abc.ABC):
    """One thing that is done with every group of images, or with the first ``limit``, in each run or once.

    ``model_name`` and ``row`` are its names in the tables.
    """

    model_name: str
    row: str
    model: Model
    attack: Attack | None
    limit: int | None = None
    once: bool = False

    @property
    def name(self) -> str:
        return f"{self.model_name}/{self.row}"

    @abc.abstractmethod
    def describe(self) -> Line:
        """What decides about its lines, as JSON."""

    @abc.abstractmethod
    def run(self, batch: Batch) -> tuple[list[Line], dict[str, Tensor]]:
        """One line per image, JSON-ready, and tensors by name, on the CPU; a function of the batch alone."""

    def passes_per_image(self) -> int | None:
        """Network passes for each image; None where they are not known before the first work unit."""
        return self._passes(self.model) if isinstance(self.model, PurifiedClassifier) else 0

    @abc.abstractmethod
    def _passes(self, model: PurifiedClassifier) -> int | None: ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PredictionTask(Task):
    """Predictions 0 to N + R - 1 of the images after an attack, or of the clean ones, by the same noise.

    A line has "predictions" (N) and "reevaluated" (R), the predicted classes; "one_latent", the mean share over all of
    them of latents that are right by themselves, where the model has latents; "vote_right", whether the vote is right
    at some iterations (``vote_iterations``), where the model has them. Of clean images: "search", as many further
    predictions as a search may make. After an attack: "queries", evaluations of the model per image;
    "search_succeeded", whether any prediction during the search was wrong, and "search_predictions", how many there
    were (both null where the search evaluates something else than the model as it is); "zero_gradient", whether every
    gradient was zero, and "nonfinite_gradients", the share of them that were NaN or infinite (both null for an attack
    without); "distance".

    Tensors: "images" [B, C, H, W], and "purified" of them, uint8; "history.<name>" [S, B] of an attack, "loop.<name>"
    [N, B] of the purification.
    """

    predictions: int
    reevaluations: int
    attack: Attack | None = None
    search: int = 0
    row: str = CLEAN

    def describe(self) -> Line:
        attack = {"attack": None, "search": self.search} if self.attack is None else {"attack": self.attack.to_dict()}
        return {**attack, "images": self.limit, "once": self.once}

    def run(self, batch: Batch) -> tuple[list[Line], dict[str, Tensor]]:
        images, facts, tensors = (batch.images, [], {}) if self.attack is None else self._attacked(self.attack, batch)
        total = self.predictions + self.reevaluations
        found = predict(self.model, images, batch.labels, batch.indices, range(total))
        if self.attack is None:
            numbers = range(total, total + self.search)
            further = predict(self.model, images, batch.labels, batch.indices, numbers).labels
            facts = [{"search": predicted} for predicted in further.T.tolist()]
        share = None if found.one_latent is None else found.one_latent.double().mean(dim=0).tolist()
        lines = [
            {
                **line,
                "predictions": found.labels[: self.predictions, row].tolist(),
                "reevaluated": found.labels[self.predictions :, row].tolist(),
                "one_latent": None if share is None else share[row],
                "vote_right": None if found.vote_right is None else found.vote_right[:, row].tolist(),
                **own,
            }
            for row, (line, own) in enumerate(zip(batch.lines(), facts, strict=True))
        ]
        tensors |= {} if found.purified is None else {"purified": found.purified}
        return lines, {"images": images.cpu(), **tensors, **{f"loop.{name}": part for name, part in found.loop.items()}}

    def _attacked(self, attack: Attack, batch: Batch) -> tuple[Tensor, list[Line], dict[str, Tensor]]:
        """The attacked images, what a line says of the attack, and its history."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradientWarning)  # it is in the lines, and fails a check
            result = attack(self.model, batch.images, batch.labels, indices=batch.indices)
        count, attempts = attack.predictions_per_image(), result.candidates.shape[1]
        wrong = result.any_candidate_success if attempts > 1 else torch.zeros_like(result.success)
        if count and "reached" in result.history:
            wrong = wrong | (result.history["reached"] > 0).any(dim=0)
        count += attempts if attempts > 1 else 0
        norms = result.history.get("gradient_norm")
        zero = [None] * len(wrong) if norms is None else norms.eq(0).all(dim=0).tolist()
        nonfinite = [None] * len(wrong) if result.nonfinite is None else result.nonfinite.tolist()
        facts = [
            {
                "queries": result.queries,
                "search_succeeded": succeeded if count else None,
                "search_predictions": count or None,
                "zero_gradient": none,
                "nonfinite_gradients": share,
                "distance": distance,
            }
            for succeeded, none, share, distance in zip(
                wrong.tolist(), zero, nonfinite, result.distance.tolist(), strict=True
            )
        ]
        history = {f"history.{name}": values.detach().cpu().float() for name, values in result.history.items()}
        return result.images, facts, history

    def _passes(self, model: PurifiedClassifier) -> int | None:
        after = self.predictions + self.reevaluations
        if self.attack is None:
            return model.purifier.passes * (after + self.search)
        search = self.attack.passes_per_image(model)
        return None if search is None else search + (after + 1) * model.purifier.passes  # it evaluates its result once


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GradientTask(Task):
    """How much of an averaged gradient is direction: gradients of the attack's loss at a random point of its ball.

    A line has "cosines": for n = 1, 2, 4, ... up to half of the samples, the cosine between the mean of n gradients and
    the mean of n others; and "variances": of disjoint means of n, as many as there are, the sum of their elements'
    variances, relative to the squared length of the mean of all (Lee and Kim 2023, arXiv 2303.09051).
    """

    attack: PGD
    samples: int
    row: str = "gradients"
    once: bool = True

    def describe(self) -> Line:
        attack, samples = self.attack.to_dict(), self.samples
        return {"attack": attack, "samples": samples, "images": self.limit, "once": self.once}

    def run(self, batch: Batch) -> tuple[list[Line], dict[str, Tensor]]:
        with torch.inference_mode(False), isolated(self.attack.seed, *batch.indices.tolist()):
            drawn = self._drawn(batch)
        counts = [n for n in (2**power for power in range(32)) if 2 * n <= self.samples]
        cosines = [torch.cosine_similarity(drawn[:n].mean(0), drawn[n : 2 * n].mean(0), dim=1) for n in counts]
        length = drawn.mean(dim=0).square().sum(dim=1).clamp_min(1e-300)
        variances = [
            torch.stack([part.mean(0) for part in drawn[: len(drawn) // n * n].split(n)]).var(dim=0).sum(dim=1) / length
            for n in counts
        ]
        lines = []
        for row, line in enumerate(batch.lines()):
            own = {"cosines": [c[row].item() for c in cosines], "variances": [v[row].item() for v in variances]}
            lines.append(line | {"samples": counts, **own})
        return lines, {}

    def _drawn(self, batch: Batch) -> Tensor:
        """[samples, B, C * H * W]."""
        seeds = derived_seeds(batch.indices, self.attack.seed)
        oracle = Oracle(self.model, seeds).in_mode(self.attack.gradient, self)
        point = random_point(self.attack.threat, batch.indices, usable(batch.images))
        goal = Goal(usable(batch.labels))
        loss, balanced = self.attack.loss, self.attack.balanced
        drawn = [oracle.feedback(point, goal, loss, 1, balanced=balanced).gradient for _ in range(self.samples)]
        return torch.stack(drawn).flatten(2).double()

    def _passes(self, model: PurifiedClassifier) -> int:
        return model.purifier.passes * self.samples


def make_tasks(
    models: Mapping[str, Model],
    attacks: Mapping[str, Mapping[str, Attack]],
    protocol: Protocol,
    image_shape: tuple[int, ...],
) -> list[Task]:
    """All tasks of an evaluation, in the order in which they are done and shown."""
    tasks: list[Task] = []
    counts: dict[str, Any] = {"predictions": protocol.predictions, "reevaluations": protocol.reevaluations}
    for name, model in models.items():
        search = max((attack.predictions_per_image() for attack in attacks[name].values()), default=0)
        search = search if protocol.search_on_clean else 0
        tasks.append(PredictionTask(model_name=name, model=model, search=search, **counts))
        for row, attack in attacks[name].items():
            tasks.append(PredictionTask(model_name=name, row=row, model=model, attack=attack, **counts))
    first, model = next(iter(models.items()))
    if protocol.sanity_images and attacks[first]:
        tasks += _check_tasks(model, attacks[first], protocol, image_shape)
    names = [task.name for task in tasks]
    folded = [name.casefold() for name in names]  # some systems take these for the same file
    for name in names:
        if folded.count(name.casefold()) > 1 or not all(map(is_file_name, name.split("/"))):
            raise SettingsError(f"{name!r} names two tasks, or is no name for a file on every system: rename it.")
    return tasks


def check_attack(model: Model, attacks: Mapping[str, Attack]) -> tuple[str | None, PGD]:
    """The attack that the checks are made with, and its name: "bpda-eot" where there is one, or else the first attack
    that offers one (``sweep_attack``), or else (None) one with the standard suite's settings.
    """
    for name in ("bpda-eot", *attacks):
        attack = attacks.get(name)
        offered = None if attack is None else attack.sweep_attack()
        if offered is not None:
            return name, offered
    threat = next(iter(attacks.values())).threat
    gradient = StraightThrough() if isinstance(model, PurifiedClassifier) else None
    return None, PGD(threat, steps=20, eot=4, momentum=0.75, schedule="cosine", gradient=gradient)


def check_variants(attack: PGD, image_shape: tuple[int, ...]) -> dict[str, PGD]:
    """The attack of the checks with a quarter and a half of its steps, and at other sizes, by the names of their tasks;
    "eps-any" allows every image."""
    fewer = sorted({max(1, attack.steps // 4), max(1, attack.steps // 2)} - {attack.steps})
    any_image = attack.threat.largest_eps(image_shape)
    sizes = {f"eps-{factor:g}x": factor * attack.threat.eps for factor in EPS_FACTORS}
    sizes = {name: eps for name, eps in sizes.items() if eps < any_image} | {"eps-any": any_image}
    variants = {f"steps-{count}": dataclasses.replace(attack, steps=count) for count in fewer}
    for name, eps in sizes.items():
        variants[name] = dataclasses.replace(attack, threat=attack.threat.replace(eps=eps), step_size=None)
    return variants


def _check_tasks(
    model: Model, attacks: Mapping[str, Attack], protocol: Protocol, image_shape: tuple[int, ...]
) -> list[Task]:
    """The variants of the attack of the checks, itself where it is none of the attacks, and its gradients."""
    name, attack = check_attack(model, attacks)
    variants = check_variants(attack, image_shape) | ({"attack": attack} if name is None else {})
    common: dict[str, Any] = {"model_name": CHECKS, "model": model, "limit": protocol.sanity_images, "once": True}
    counts: dict[str, Any] = {"predictions": protocol.predictions, "reevaluations": 1}
    tasks = [PredictionTask(row=row, attack=how, **common, **counts) for row, how in variants.items()]
    return [*tasks, GradientTask(attack=attack, samples=protocol.gradient_samples, **common)]


def is_file_name(part: str) -> bool:
    return bool(part) and part.strip(" .") == part and not set(part) & set('\\<>:"|?*') and part.isprintable()
