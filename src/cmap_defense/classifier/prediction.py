"""Predictions that may be withheld: labels with a confidence, and thresholds that were chosen on clean images."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from cmap_defense.common.settings import require_choice, require_number
from cmap_defense.errors import InputValueError
from cmap_defense.results import PurificationResult

SCORES = ("confidence", "agreement")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Thresholds for predictions, from clean images.

    Attributes:
        score: "confidence", the mean probability of the predicted label over the K purified versions; or "agreement",
            the mean probability that they give to the label of the image before purification.
        lowest_score: predictions with a lower score are withheld.
        largest_distance: an image is not restored where the nearest of its versions is further away, as a mean
            absolute difference in units of images in [0, 1].
        coverage: share of the clean images with a score of ``lowest_score`` at least.
        restored: share of the clean images within ``largest_distance``.
        images: number of the clean images.
    """

    score: str
    lowest_score: float
    largest_distance: float
    coverage: float
    restored: float
    images: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Labels of images, and how far to trust them.

    Attributes:
        labels: [B] int64, what the vote says: the majority labels (eq. 14), unless ``vote="soft"``.
        confidence: [B] in [0, 1], the mean probability of the label over the K purified versions.
        votes: [B, classes] int64, how many of the K versions are classified so.
        agreement: [B] in [0, 1], the mean probability that the versions give to the undefended classifier's label.
        distance: [B], mean absolute difference between the image and the nearest of its versions, in units of images in
            [0, 1].
        abstained: [B] bool, whether the score is below the calibrated threshold; None before ``calibrate``.
        unrestored: [B] bool, whether the distance is above the calibrated one; None before ``calibrate``.
    """

    labels: Tensor
    confidence: Tensor
    votes: Tensor
    agreement: Tensor
    distance: Tensor
    abstained: Tensor | None = None
    unrestored: Tensor | None = None

    def score(self, name: str) -> Tensor:
        """[B], the confidence or the agreement."""
        return self.confidence if name == "confidence" else self.agreement

    def __repr__(self) -> str:
        shown = [f"{len(self.labels)} images", f"mean confidence {self.confidence.mean():.3f}"]
        for name in ("abstained", "unrestored"):
            flags = getattr(self, name)
            if flags is not None:
                shown.append(f"{int(flags.sum())} {name}")
        return f"Prediction({', '.join(shown)})"


def prediction_of(
    result: PurificationResult, images: Tensor, undefended: Tensor, calibration: Calibration | None
) -> Prediction:
    """The prediction of images [B, C, H, W] in [0, 1] that were purified, ``undefended`` being the classifier's logits
    [B, classes] on them without purification."""
    assert result.logits is not None
    assert result.labels is not None
    assert result.votes is not None
    probabilities = result.logits.softmax(dim=-1).mean(dim=1)
    distance = (result.images - images[:, None]).abs().flatten(2).mean(dim=2).amin(dim=1)
    found = Prediction(
        result.labels,
        probabilities.gather(1, result.labels[:, None])[:, 0],
        result.votes,
        probabilities.gather(1, undefended.argmax(dim=1, keepdim=True))[:, 0],
        distance,
    )
    if calibration is None:
        return found
    return dataclasses.replace(
        found,
        abstained=found.score(calibration.score) < calibration.lowest_score,
        unrestored=distance > calibration.largest_distance,
    )


def check_calibration(coverage: float, restored: float, score: str) -> None:
    """Raises ``SettingsError`` where a share is not above 0 and at most 1, or the score has no such name."""
    require_choice("calibrate", "score", score, SCORES)
    for name, share in (("coverage", coverage), ("restored", restored)):
        require_number("calibrate", name, share, above=0.0, maximum=1.0)


def calibration_of(clean: Prediction, *, coverage: float, restored: float, score: str) -> Calibration:
    """Thresholds such that these shares of clean predictions are kept. Raises InputValueError without images."""
    if not len(clean.labels):
        raise InputValueError("There are no images to calibrate on: give clean ones that are not used elsewhere.")
    scores = clean.score(score).double()
    lowest = _kept(scores.sort(descending=True).values, coverage)
    largest = _kept(clean.distance.double().sort().values, restored)
    return Calibration(
        score,
        lowest,
        largest,
        (scores >= lowest).double().mean().item(),
        (clean.distance.double() <= largest).double().mean().item(),
        len(scores),
    )


def _kept(values: Tensor, share: float) -> float:
    """The last of the first values [B] that make up a share of them, at least."""
    return values[math.ceil(share * len(values) - 1e-9) - 1].item()
