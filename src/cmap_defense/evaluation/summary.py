"""From lines to figures: accuracies with intervals, the worst attack on each image, and what luck alone would do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmap_defense.evaluation.accuracy import Accuracy

__all__ = ["MEASURES", "Row", "Runs", "WorstCase", "row_of", "worst_case"]

MEASURES = ("one_shot", "average", "any_of", "vote", "repurified")
"""Columns of a row; what each of them counts as right stands in :class:`Row`."""

LUCK_DRAWS = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """The lines of one model under one attack, as numbers: S runs of B images.

    answers: [S, B, N] bool, which answers are right. repurified: [S, B, R] bool. one_latent: [S, B], or None.
    labels: [S, B, N] int64, the answers themselves. truth: [B]. positions: [B].
    """

    subject: str
    attack: str
    answers: Tensor
    repurified: Tensor
    labels: Tensor
    truth: Tensor
    positions: Tensor
    one_latent: Tensor | None
    lines: Sequence[Sequence[Mapping[str, Any]]]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Runs:
        """From the lines of all runs of one task, which have the same images."""
        by_seed: dict[int, list[Mapping[str, Any]]] = {}
        for line in lines:
            by_seed.setdefault(line["seed"], []).append(line)
        runs = list(by_seed.values())
        truth = torch.tensor([line["label"] for line in runs[0]])
        labels = torch.tensor([[line["answers"] for line in run] for run in runs])
        repurified = torch.tensor([[line["repurified"] for line in run] for run in runs])
        shares = [[line["one_latent"] for line in run] for run in runs]
        return cls(
            subject=runs[0][0]["subject"],
            attack=runs[0][0]["attack"],
            answers=labels == truth[:, None],
            repurified=repurified == truth[:, None],
            labels=labels,
            truth=truth,
            positions=torch.tensor([line["image"] for line in runs[0]]),
            one_latent=None if shares[0][0] is None else torch.tensor(shares, dtype=torch.float64),
            lines=runs,
        )

    def vote_right(self) -> Tensor:
        """[S, B], whether the most frequent of the N answers is right; the lower class on ties."""
        return self.labels.mode(dim=2).values == self.truth

    def first(self, count: int) -> Runs:
        """Of the first images and the first run."""
        part = (slice(0, 1), slice(0, count))
        return Runs(
            self.subject,
            self.attack,
            self.answers[part],
            self.repurified[part],
            self.labels[part],
            self.truth[:count],
            self.positions[:count],
            None if self.one_latent is None else self.one_latent[part],
            [self.lines[0][:count]],
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """A model under an attack: each accuracy is the mean over the runs, with the interval that its images allow.

    one_shot: the first answer is right. average: the share of the N answers. any_of: all N are right (any wrong one
    loses). vote: the most frequent of the N. repurified: the share of the R further answers.
    spread: standard deviation of each over the runs; empty with one run. answers_spread: that of the accuracy of single
    answers over the R. one_latent: the mean accuracy of single latents, without their vote.
    searched: no answer heard while searching was wrong. searched_by_luck: no answer of as many about clean images was.
    search_answers: how many. queries: evaluations of the model per image. distance: the largest.
    """

    subject: str
    attack: str
    images: int
    runs: int
    one_shot: Accuracy
    average: Accuracy
    any_of: Accuracy
    vote: Accuracy
    repurified: Accuracy
    spread: Mapping[str, float]
    answers_spread: float
    one_latent: float | None
    searched: Accuracy | None = None
    searched_by_luck: Accuracy | None = None
    search_answers: int | None = None
    queries: int | None = None
    distance: float | None = None


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """The headline: the lowest accuracy that the attacks reach, each image by itself or one of them for all images.

    accuracy is the lower of two, both on the R further predictions: that under the worst attack on each image, and the
    lowest re-purified accuracy of a single row of the defended model, the clean images among them, since an attacker
    may leave an image as it is. So no row of the table lies below it. spread: its standard deviation over the runs
    (None with one run).

    by_image: under the worst attack on each image, which is chosen by the N predictions and counted on the R others, so
    that no chance in the choice is counted. Where attacks are about equally strong the choice is made by chance, and
    one of them alone can be lower. single: the row that is lower than by_image; None where none is.
    chosen: on how many images, summed over the runs, each attack was the worst; of attacks that are equally strong on
    an image the one that is strongest over all images, and of those the first is named and the mean of all counted.
    lowest: every one of the attacks' votes is right, as the worst case is counted elsewhere. What luck alone leaves of
    it lies between two figures. clean: the vote on clean images, which is left where attacks do nothing at all, since
    all of them are answered by the same noise. lowest_by_luck: that many votes on clean images by unrelated noise:
    their answers, those to the search control too, are dealt out to as many votes, again and again (drawn with
    replacement where they do not suffice).
    """

    accuracy: Accuracy
    spread: float | None
    by_image: Accuracy
    single: str | None
    chosen: Mapping[str, int]
    lowest: Accuracy
    clean: Accuracy
    lowest_by_luck: float


def row_of(runs: Runs, control: Runs | None = None) -> Row:
    """The row of a task. control: the same model on clean images, whose further answers tell what luck does."""
    right = {
        "one_shot": runs.answers[:, :, 0].double(),
        "average": runs.answers.double().mean(dim=2),
        "any_of": runs.answers.all(dim=2).double(),
        "vote": runs.vote_right().double(),
        "repurified": runs.repurified.double().mean(dim=2),
    }
    counted = {name: Accuracy.mean(values.mean(dim=0)) for name, values in right.items()}
    several = len(runs.answers) > 1
    spread = {name: values.mean(dim=1).std().item() for name, values in right.items()} if several else {}
    single = runs.repurified.double().mean(dim=1)
    searched, by_luck, heard = _searched(runs, control)
    first = runs.lines[0][0]
    return Row(
        subject=runs.subject,
        attack=runs.attack,
        images=len(runs.truth),
        runs=len(runs.answers),
        spread=spread,
        answers_spread=single.std(dim=1).mean().item() if single.shape[1] > 1 else 0.0,
        one_latent=None if runs.one_latent is None else runs.one_latent.mean().item(),
        searched=searched,
        searched_by_luck=by_luck,
        search_answers=heard,
        queries=first.get("queries"),
        distance=max((line["distance"] for run in runs.lines for line in run if "distance" in line), default=None),
        **counted,
    )


def _searched(runs: Runs, control: Runs | None) -> tuple[Accuracy | None, Accuracy | None, int | None]:
    """Accuracy while searching, that by luck, and over how many answers."""
    heard = runs.lines[0][0].get("search_answers")
    if heard is None:
        return None, None, None
    found = torch.tensor([[line["searched"] for line in run] for run in runs.lines])
    searched = Accuracy.mean((~found).double().mean(dim=0))
    if control is None:
        return searched, None, heard
    clean = _heard(control)
    if clean.shape[2] < heard:
        return searched, None, heard
    by_luck = (clean[:, :, :heard] == control.truth[:, None]).all(dim=2)
    return searched, Accuracy.mean(by_luck.double().mean(dim=0)), heard


def worst_case(attacks: Sequence[Runs], control: Runs, draws: int = LUCK_DRAWS) -> WorstCase:
    """Over attacks on the same images in the same runs; control: clean images; draws: of what luck does."""
    chosen_by = torch.stack([runs.answers.sum(dim=2) for runs in attacks])  # [M, S, B]
    counted_on = torch.stack([runs.repurified.double().mean(dim=2) for runs in attacks])
    strength = chosen_by.sum(dim=(1, 2))[:, None, None].expand_as(chosen_by)
    equal = chosen_by == chosen_by.amin(dim=0)
    strongest = torch.where(equal, strength, strength.max() + 1).amin(dim=0)
    equal &= strength == strongest
    right = (counted_on * equal).sum(dim=0) / equal.sum(dim=0)  # [S, B]
    worst = equal.int().argmax(dim=0)
    by_image = Accuracy.mean(right.mean(dim=0))
    rows = {runs.attack: runs.repurified.double().mean(dim=2) for runs in (*attacks, control)}
    alone = {name: Accuracy.mean(shares.mean(dim=0)) for name, shares in rows.items()}
    single = min(alone, key=lambda name: alone[name].value)
    if alone[single].value < by_image.value:
        accuracy, by_run = alone[single], rows[single].mean(dim=1)
    else:
        accuracy, by_run, single = by_image, right.mean(dim=1), None
    votes = torch.stack([runs.vote_right() for runs in attacks]).all(dim=0)
    return WorstCase(
        accuracy=accuracy,
        spread=by_run.std().item() if len(by_run) > 1 else None,
        by_image=by_image,
        single=single,
        chosen={runs.attack: int((worst == number).sum()) for number, runs in enumerate(attacks)},
        lowest=Accuracy.mean(votes.double().mean(dim=0)),
        clean=Accuracy.mean(control.vote_right().double().mean(dim=0)),
        lowest_by_luck=_luck(control, len(attacks), draws),
    )


def _luck(control: Runs, attacks: int, draws: int) -> float:
    """The share of clean images that win ``attacks`` votes of N in a row, each vote on answers of their own."""
    pool, count = _heard(control), control.labels.shape[2]
    needed = attacks * count
    generator = torch.Generator().manual_seed(0)
    won = torch.zeros(pool.shape[:2], dtype=torch.float64)
    for _ in range(draws):
        if needed <= pool.shape[2]:
            picked = torch.rand(pool.shape, generator=generator).argsort(dim=2)[:, :, :needed]
        else:
            picked = torch.randint(pool.shape[2], (*pool.shape[:2], needed), generator=generator)
        votes = pool.gather(2, picked).unflatten(2, (attacks, count)).mode(dim=3).values
        won += (votes == control.truth[:, None]).all(dim=2)
    value = (won / draws).mean().item()
    assert math.isfinite(value)
    return value


def _heard(control: Runs) -> Tensor:
    """[S, B, A], all answers to the clean images; the N alone where no search was controlled for."""
    if "search" not in control.lines[0][0]:
        return control.labels
    return torch.tensor(
        [[line["answers"] + line["repurified"] + line["search"] for line in run] for run in control.lines]
    )
