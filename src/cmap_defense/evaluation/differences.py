"""Differences of evaluations, image by image, with their intervals."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.common.paths import expanded
from cmap_defense.common.statistics import mean_interval
from cmap_defense.errors import EvaluationError
from cmap_defense.evaluation.summary import Runs, under_worst
from cmap_defense.evaluation.tasks import CLEAN, DEFENDED

WORST = "worst of these"
"""Name of what is counted under the worst attack: on each image, or on all of them where that is lower."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between two defences on the same images under one attack.

    Attributes:
        first: name of a defence.
        second: name of the other one.
        attack: name of the attack, "clean", or "worst of these" for the worst as ``WorstCase.accuracy`` counts it.
        images: number of images.
        value: in [-1, 1], the mean over the images of the share of re-evaluations of the first that are right, minus
            that of the second.
        half_width: of its 95 % interval by Student's t; None where the difference is the same on each image.
    """

    first: str
    second: str
    attack: str
    images: int
    value: float
    half_width: float | None

    def __str__(self) -> str:
        return f"{self.value:+.3f}" + (" on each" if self.half_width is None else f" ± {self.half_width:.3f}")


def paired_differences(folders: Mapping[str, str | Path]) -> list[Difference]:
    """The differences of each two defences on the images that both have, on clean ones and under each attack that both
    have met.

        paired_differences({"one-step": "runs/comparison/one-step", "diffpure": "runs/comparison/diffpure"})

    Intervals of two accuracies are wider than that of their difference, since both have the same images. Each interval
    holds by itself: of twenty, one misses by chance. Attacks of one name count as the same, whatever their settings.

    Args:
        folders: by name, the folders of finished evaluations or of the defences of a comparison.

    Raises:
        EvaluationError: a folder has no results, or two folders have no image in common or other labels for it.
    """
    found = {name: _Shares.read(expanded(folder)) for name, folder in folders.items()}
    differences = []
    for first, second in itertools.combinations(found, 2):
        one, other = found[first], found[second]
        images = [image for image in one.labels if image in other.labels]
        if not images or any(one.labels[image] != other.labels[image] for image in images):
            raise EvaluationError(
                f"{first} and {second} have no images in common, by their positions and labels: evaluate both on the "
                "same data."
            )
        same = one.right.keys() - {WORST} == other.right.keys() - {WORST}
        for attack in one.right:
            if attack in other.right and (attack != WORST or same):
                gaps = [one.right[attack][image] - other.right[attack][image] for image in images]
                value, half_width = mean_interval(torch.tensor(gaps, dtype=torch.float64, device="cpu"))
                differences.append(Difference(first, second, attack, len(images), value, half_width))
    return differences


def differences_table(differences: Sequence[Difference]) -> list[list[str]]:
    """Headings, and a row for each two defences."""
    attacks = sorted(dict.fromkeys(difference.attack for difference in differences), key=WORST.__eq__)  # that one last
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for difference in differences:
        rows.setdefault((difference.first, difference.second), {})[difference.attack] = str(difference)
    head = ["first", "second", *attacks]
    return [head, *([*pair, *(cells.get(attack, "") for attack in attacks)] for pair, cells in rows.items())]


@dataclasses.dataclass(frozen=True)
class _Shares:
    """By image, its label; and by attack and image, the share of re-evaluations that are right."""

    labels: Mapping[int, int]
    right: Mapping[str, Mapping[int, float]]

    @classmethod
    def read(cls, folder: Path) -> _Shares:
        path = folder / "results.jsonl"
        if not path.is_file():
            raise EvaluationError(f"{folder} has no results.jsonl, which a finished evaluation writes.")
        tasks: dict[str, list[dict[str, Any]]] = {}
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line["model"] == DEFENDED:
                tasks.setdefault(line["attack"], []).append(line)
        runs = {attack: Runs.of(lines) for attack, lines in tasks.items()}
        images = [line["image"] for line in runs[CLEAN].lines[0]]
        shares = {attack: run.reevaluated.double().mean(dim=2) for attack, run in runs.items()}
        attacks = [run for attack, run in runs.items() if attack != CLEAN]
        if len(attacks) > 1:
            shares[WORST] = min(under_worst(attacks)[0], *shares.values(), key=Tensor.mean)
        right = {name: dict(zip(images, share.mean(dim=0).tolist(), strict=True)) for name, share in shares.items()}
        return cls(dict(zip(images, runs[CLEAN].truth.tolist(), strict=True)), right)
