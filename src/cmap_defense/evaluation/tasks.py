"""The work on one group of images: attack it, ask about it, or look at its gradients. One line per image comes out."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks import PGD, Attack, AttackResult, Goal
from cmap_defense.attacks.oracle import Model, Oracle, usable
from cmap_defense.attacks.steps import random_point
from cmap_defense.errors import GradientWarning
from cmap_defense.evaluation.answers import Answers, ask
from cmap_defense.evaluation.describe import attack_settings, describe_attack
from cmap_defense.rng import derived_seeds, isolated

__all__ = ["CONTROL", "AttackTask", "ControlTask", "GradientTask", "Group", "Outcome", "Task"]

CONTROL = "control"
"""The name of clean images among the attacks."""

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """images: [B, C, H, W] in [0, 1], labels: [B], on the model's device. positions: [B] in the data set, on the CPU.
    indices: [B], the noise indices of the run, on the CPU."""

    images: Tensor
    labels: Tensor
    positions: Tensor
    indices: Tensor

    def named(self) -> list[Line]:
        """The beginning of each image's line."""
        pairs = zip(self.positions.tolist(), self.labels.tolist(), strict=True)
        return [{"image": position, "label": label} for position, label in pairs]


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """lines: one per image, JSON-ready. tensors: by name, on the CPU."""

    lines: list[Line]
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


class Task(abc.ABC):
    """One thing that is done with every group.

    subject, attack: whose model and by what. model: images in [0, 1] to logits. limit: how many of the images, the
    first of them; None for all. once: in the first run only.
    """

    subject: str
    attack: str
    model: Model
    limit: int | None = None
    once: bool = False

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.attack}"

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides about its lines, as JSON."""

    @abc.abstractmethod
    def run(self, group: Group) -> Outcome:
        """The lines of a group; a function of the group alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class AttackTask(Task):
    """Attack, then answers 0 to N + R - 1 about the final images.

    A line has "answers" (N) and "repurified" (R), the predicted classes; "one_latent", the mean share over all of them
    of latents that are right by themselves, where the model has latents; "queries", evaluations of the model per image;
    "searched", whether any answer heard while searching was wrong, and "search_answers", how many such answers there
    were (both null where the search asks something else than the model as it is); "zero_gradient", whether every
    gradient was zero (null for an attack without); "distance"; "on_the_way", whether the vote is right at some
    iterations (:func:`~cmap_defense.evaluation.answers.looked_at`), where the model has them. Tensors: "images"
    [B, C, H, W], and "purified" after the attack, uint8; "history.<name>" [S, B] of the attack, "loop.<name>" [N, B] of
    the purification.
    """

    subject: str
    attack: str
    model: Model
    how: Attack
    answers: int
    repurifications: int
    limit: int | None = None
    once: bool = False

    def describe(self) -> dict[str, Any]:
        return {**_described(self.how), "images": self.limit, "once": self.once}

    def run(self, group: Group) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradientWarning)  # it is in the lines, and fails a check
            result = self.how(self.model, group.images, group.labels, indices=group.indices)
        total = self.answers + self.repurifications
        heard = ask(self.model, result.images, group.labels, group.indices, range(total))
        norms = result.history.get("gradient_norm")
        still = None if norms is None else norms.eq(0).all(dim=0).tolist()
        searched, asked = _searched(self.how, result)
        lines = [
            line
            | {
                "queries": result.queries,
                "searched": None if searched is None else bool(searched[row]),
                "search_answers": asked,
                "zero_gradient": None if still is None else still[row],
                "distance": result.distance[row].item(),
            }
            for row, line in enumerate(_answer_lines(group, heard, self.answers))
        ]
        history = {f"history.{name}": values.detach().cpu().float() for name, values in result.history.items()}
        return Outcome(lines, {"images": result.images.cpu(), **history, **_shown(heard)})


@dataclasses.dataclass(frozen=True, eq=False)
class ControlTask(Task):
    """Answers about the clean images: the same as about attacked ones, with the same noise.

    A line has what an attack's has, and besides "search": as many further answers as a search may hear.
    """

    subject: str
    model: Model
    answers: int
    repurifications: int
    search: int
    attack: str = CONTROL
    limit: int | None = None
    once: bool = False

    def describe(self) -> dict[str, Any]:
        return {"attack": None, "search": self.search, "images": self.limit, "once": self.once}

    def run(self, group: Group) -> Outcome:
        total = self.answers + self.repurifications
        heard = ask(self.model, group.images, group.labels, group.indices, range(total))
        further = torch.zeros((0, len(group.images)), dtype=torch.int64)
        if self.search:
            numbers = range(total, total + self.search)
            further = ask(self.model, group.images, group.labels, group.indices, numbers).labels
        lines = [
            line | {"search": further[:, row].tolist()}
            for row, line in enumerate(_answer_lines(group, heard, self.answers))
        ]
        return Outcome(lines, {"images": group.images.cpu(), **_shown(heard)})


@dataclasses.dataclass(frozen=True, eq=False)
class GradientTask(Task):
    """How much of an averaged gradient is direction: gradients of the attack's loss at a random point of its ball.

    A line has "cosines": for n = 1, 2, 4, ... up to half of the samples, the cosine between the mean of n gradients and
    the mean of n others; and "variances": of disjoint means of n, as many as there are, the sum of their elements'
    variances, relative to the squared length of the mean of all (Lee and Kim 2023, arXiv 2303.09051, look at it over n
    in the same way).
    """

    subject: str
    model: Model
    how: PGD
    samples: int
    limit: int | None = None
    attack: str = "gradients"
    once: bool = True

    def describe(self) -> dict[str, Any]:
        return {**_described(self.how), "samples": self.samples, "images": self.limit, "once": self.once}

    def run(self, group: Group) -> Outcome:
        with torch.inference_mode(False), isolated(self.how.seed, *group.indices.tolist()):
            drawn = self._drawn(group)
        counts = [n for n in (2**power for power in range(32)) if 2 * n <= self.samples]
        cosines = [torch.cosine_similarity(drawn[:n].mean(0), drawn[n : 2 * n].mean(0), dim=1) for n in counts]
        length = drawn.mean(dim=0).square().sum(dim=1).clamp_min(1e-300)
        spreads = [
            torch.stack([part.mean(0) for part in drawn[: len(drawn) // n * n].split(n)]).var(dim=0).sum(dim=1) / length
            for n in counts
        ]
        lines = [
            line
            | {
                "samples": counts,
                "cosines": [cosine[row].item() for cosine in cosines],
                "variances": [spread[row].item() for spread in spreads],
            }
            for row, line in enumerate(group.named())
        ]
        return Outcome(lines)

    def _drawn(self, group: Group) -> Tensor:
        """[samples, B, C * H * W]."""
        oracle = Oracle(self.model, derived_seeds(group.indices, self.how.seed)).in_mode(self.how.gradient, self)
        point = random_point(self.how.threat, group.indices, usable(group.images))
        goal = Goal(usable(group.labels))
        drawn = [oracle.feedback(point, goal, self.how.loss, 1).gradient.flatten(1) for _ in range(self.samples)]
        return torch.stack(drawn).double()


def _searched(attack: Attack, result: AttackResult) -> tuple[Tensor | None, int | None]:
    """[B], whether an answer was wrong while searching, and how many there were."""
    asked, attempts = attack.predictions_per_image(), result.candidates.shape[1]
    found = result.any_candidate_success if attempts > 1 else torch.zeros_like(result.success)
    if asked and "reached" in result.history:
        found = found | (result.history["reached"] > 0).any(dim=0)
    heard = asked + (attempts if attempts > 1 else 0)
    return (found.cpu(), heard) if heard else (None, None)


def _described(attack: Attack) -> dict[str, Any]:
    """An attack as a text for people, and by its settings to be compared."""
    return {"attack": describe_attack(attack), "settings": attack_settings(attack)}


def _shown(heard: Answers) -> dict[str, Tensor]:
    purified = {} if heard.purified is None else {"purified": heard.purified}
    return purified | {f"loop.{name}": values for name, values in heard.loop.items()}


def _answer_lines(group: Group, heard: Answers, answers: int) -> list[Line]:
    share = None if heard.one_latent is None else heard.one_latent.double().mean(dim=0).tolist()
    return [
        line
        | {
            "answers": heard.labels[:answers, row].tolist(),
            "repurified": heard.labels[answers:, row].tolist(),
            "one_latent": None if share is None else share[row],
            "on_the_way": None if heard.on_the_way is None else heard.on_the_way[:, row].tolist(),
        }
        for row, line in enumerate(group.named())
    ]
