"""From lines to figures: accuracies with intervals, the worst attack on each image, and what chance alone does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmap_defense.common.statistics import Accuracy, most_frequent

MEASURES = ("one_shot", "average", "worst_of", "vote", "reevaluated")
"""Accuracies of a row, see ``Row``."""

CHANCE_DRAWS = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """The lines of one model under one attack, as numbers: S runs of B images.

    Attributes:
        model: name of the model.
        attack: name of the attack.
        labels: [S, B, N] int64, the predictions.
        right: [S, B, N] bool, which of them are right.
        reevaluated: [S, B, R] bool.
        truth: [B], the true classes.
        one_latent: [S, B]; None for a model without latents.
        lines: the lines themselves, by run.
    """

    model: str
    attack: str
    labels: Tensor
    right: Tensor
    reevaluated: Tensor
    truth: Tensor
    one_latent: Tensor | None
    lines: Sequence[Sequence[Mapping[str, Any]]]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Runs:
        """From the lines of all runs of one task, which have the same images."""
        by_seed: dict[int, list[Mapping[str, Any]]] = {}
        for line in lines:
            by_seed.setdefault(line["seed"], []).append(line)
        runs = list(by_seed.values())
        truth = torch.tensor([line["label"] for line in runs[0]], device="cpu")
        labels = torch.tensor([[line["predictions"] for line in run] for run in runs], device="cpu")
        reevaluated = torch.tensor([[line["reevaluated"] for line in run] for run in runs], device="cpu")
        shares = [[line["one_latent"] for line in run] for run in runs]
        return cls(
            model=runs[0][0]["model"],
            attack=runs[0][0]["attack"],
            labels=labels,
            right=labels == truth[:, None],
            reevaluated=reevaluated == truth[:, None],
            truth=truth,
            one_latent=None if shares[0][0] is None else torch.tensor(shares, dtype=torch.float64, device="cpu"),
            lines=runs,
        )

    def vote_right(self) -> Tensor:
        """[S, B], whether the most frequent of the N predictions is right; the lower class on ties."""
        return most_frequent(self.labels, dim=2) == self.truth

    def first(self, count: int) -> Runs:
        """Of the first images and the first run."""
        return Runs.of(self.lines[0][:count])

    def shares(self, count: int | None = None) -> Tensor:
        """[B], the share of all predictions that are right, or of the first ``count`` for each image and run."""
        return torch.cat([self.right, self.reevaluated], dim=2)[:, :, :count].double().mean(dim=(0, 2))

    def all_labels(self) -> Tensor:
        """[S, B, A], all predictions of clean images; the N alone where clean images were not searched."""
        if "search" not in self.lines[0][0]:
            return self.labels
        return torch.tensor(
            [[line["predictions"] + line["reevaluated"] + line["search"] for line in run] for run in self.lines],
            device="cpu",
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """A model under an attack: each accuracy is the mean over the runs, with the interval that its images allow.

    Attributes:
        model: name of the model.
        attack: name of the attack, or "clean".
        images: number of images.
        runs: number of runs.
        one_shot: the first prediction is right.
        average: share of the N predictions that are right.
        worst_of: all N are right: any wrong one counts against the image.
        vote: the most frequent of the N is right.
        reevaluated: share of the R further predictions that are right.
        spread: standard deviation of each over the runs; empty with one run.
        prediction_spread: standard deviation of the accuracy of single predictions over the R.
        one_latent: mean accuracy of single latents, without their vote; None for a model without latents.
        search: no prediction during the search was wrong; None where the search evaluates something else.
        search_on_clean: no prediction of as many for clean images was wrong.
        search_predictions: how many those are.
        queries: evaluations of the model per image.
        distance: largest distance from a clean image.
    """

    model: str
    attack: str
    images: int
    runs: int
    one_shot: Accuracy
    average: Accuracy
    worst_of: Accuracy
    vote: Accuracy
    reevaluated: Accuracy
    spread: Mapping[str, float]
    prediction_spread: float
    one_latent: float | None
    search: Accuracy | None = None
    search_on_clean: Accuracy | None = None
    search_predictions: int | None = None
    queries: int | None = None
    distance: float | None = None


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """The headline: the lowest accuracy that the attacks reach, each image by itself or one of them for all images.

    Where attacks are about equally strong the choice for each image is made by chance, and one of them alone can be
    lower. What chance alone leaves of ``lowest`` lies between ``clean`` and ``lowest_by_chance``.

    Attributes:
        accuracy: by the R re-evaluations, the lower of ``by_image`` and of the lowest single row of the defended model,
            the clean images among them: an attacker may leave an image as it is, and no row of the table lies below it.
        spread: its standard deviation over the runs; None with one run.
        by_image: under the worst attack on each image, chosen by the N predictions and counted by the R others.
        single: the row that is lower than by_image; None where none is.
        chosen: number of images, summed over the runs, on which each attack was the worst. Of attacks that are equally
            strong on an image the one that is strongest over all images counts, and of those the first is named and
            the mean of all counted.
        lowest: every one of the attacks' votes is right, as the worst case is counted elsewhere.
        clean: the vote on clean images, which is left where attacks do nothing, since all have the same noise.
        lowest_by_chance: as many votes on clean images by unrelated noise: all their predictions are dealt out to the
            votes, again and again (drawn with replacement where they do not suffice).
    """

    accuracy: Accuracy
    spread: float | None
    by_image: Accuracy
    single: str | None
    chosen: Mapping[str, int]
    lowest: Accuracy
    clean: Accuracy
    lowest_by_chance: float


def make_row(runs: Runs, clean: Runs | None = None) -> Row:
    """The row of a task; ``clean``, the same model's predictions for clean images, shows what chance does."""
    right = {
        "one_shot": runs.right[:, :, 0].double(),
        "average": runs.right.double().mean(dim=2),
        "worst_of": runs.right.all(dim=2).double(),
        "vote": runs.vote_right().double(),
        "reevaluated": runs.reevaluated.double().mean(dim=2),
    }
    counted = {name: Accuracy.mean(values.mean(dim=0)) for name, values in right.items()}
    several = len(runs.right) > 1
    single = runs.reevaluated.double().mean(dim=1)
    first = runs.lines[0][0]
    count = first.get("search_predictions")
    search, on_clean = None, None
    if count is not None:
        failed = torch.tensor([[not line["search_succeeded"] for line in run] for run in runs.lines], device="cpu")
        search = Accuracy.mean(failed.double().mean(dim=0))
        labels = None if clean is None else clean.all_labels()
        if clean is not None and labels is not None and labels.shape[2] >= count:
            all_right = (labels[:, :, :count] == clean.truth[:, None]).all(dim=2)
            on_clean = Accuracy.mean(all_right.double().mean(dim=0))
    return Row(
        model=runs.model,
        attack=runs.attack,
        images=len(runs.truth),
        runs=len(runs.right),
        **counted,
        spread={name: values.mean(dim=1).std().item() for name, values in right.items()} if several else {},
        prediction_spread=single.std(dim=1).mean().item() if single.shape[1] > 1 else 0.0,
        one_latent=None if runs.one_latent is None else runs.one_latent.mean().item(),
        search=search,
        search_on_clean=on_clean,
        search_predictions=count,
        queries=first.get("queries"),
        distance=max((line["distance"] for run in runs.lines for line in run if "distance" in line), default=None),
    )


def under_worst(attacks: Sequence[Runs]) -> tuple[Tensor, Tensor]:
    """[S, B], the share of re-evaluations that are right under the worst attack on each image, which the predictions
    choose, and [S, B] int64, the first of the attacks that are. See ``WorstCase.chosen`` for ties."""
    chosen_by = torch.stack([runs.right.sum(dim=2) for runs in attacks])  # [M, S, B]
    counted_by = torch.stack([runs.reevaluated.double().mean(dim=2) for runs in attacks])
    strength = chosen_by.sum(dim=(1, 2))[:, None, None].expand_as(chosen_by)
    equal = chosen_by == chosen_by.amin(dim=0)
    strongest = torch.where(equal, strength, strength.max() + 1).amin(dim=0)
    equal &= strength == strongest
    return (counted_by * equal).sum(dim=0) / equal.sum(dim=0), equal.int().argmax(dim=0)


def worst_case(attacks: Sequence[Runs], clean: Runs, draws: int = CHANCE_DRAWS) -> WorstCase:
    """The worst case over attacks on the same images in the same runs, and clean images."""
    right, worst = under_worst(attacks)
    by_image = Accuracy.mean(right.mean(dim=0))
    rows = {runs.attack: runs.reevaluated.double().mean(dim=2) for runs in (*attacks, clean)}
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
        clean=Accuracy.mean(clean.vote_right().double().mean(dim=0)),
        lowest_by_chance=_by_chance(clean, len(attacks), draws),
    )


def _by_chance(clean: Runs, attacks: int, draws: int) -> float:
    """The share of clean images that win ``attacks`` votes of N, each vote by predictions of its own."""
    pool, count = clean.all_labels(), clean.labels.shape[2]
    needed = attacks * count
    generator = torch.Generator("cpu").manual_seed(0)
    won = torch.zeros(pool.shape[:2], dtype=torch.float64, device="cpu")
    for _ in range(draws):
        if needed <= pool.shape[2]:
            picked = torch.rand(pool.shape, generator=generator, device="cpu").argsort(dim=2)[:, :, :needed]
        else:
            picked = torch.randint(pool.shape[2], (*pool.shape[:2], needed), generator=generator, device="cpu")
        votes = most_frequent(pool.gather(2, picked).unflatten(2, (attacks, count)), dim=3)
        won += (votes == clean.truth[:, None]).all(dim=2)
    return (won / draws).mean().item()
