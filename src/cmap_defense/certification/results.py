"""Certificates of images, and what they say together."""

from __future__ import annotations

import dataclasses
import datetime
import math

from torch import Tensor

from cmap_defense.certification.settings import CertificationSettings
from cmap_defense.common.inputs import check_seeds
from cmap_defense.common.statistics import Accuracy
from cmap_defense.common.tables import markdown_table

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The l2 radii, for images in [0, 1], at which tables show certified accuracy, as publications do."""

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
"""Of the files that the analysis scripts of Cohen et al. read."""


@dataclasses.dataclass(frozen=True, repr=False)
class CertificationResult:
    """Certificates of B images. Each is wrong with probability alpha at most.

    Attributes:
        prediction: int64 [B], the smoothed classifier's class; -1 where it abstains.
        radius: float64 [B], no change of the image that is smaller in l2 changes that class; 0 where it abstains.
        lower_bound: float64 [B], of the probability that the base classifier gives the class chosen.
        counts: int64 [B, classes], the classes of the n copies by which it is bounded.
        abstained: bool [B], the lower bound is below 1/2.
        passes: int64 [B], network passes of backbones.
        seconds: float64 [B].
        indices: int64 [B], which image of its data set each one is.
        sigma: of the noise, for images in [0, 1].
        settings: n0, n, alpha and the seed among them.
    """

    prediction: Tensor
    radius: Tensor
    lower_bound: Tensor
    counts: Tensor
    abstained: Tensor
    passes: Tensor
    seconds: Tensor
    indices: Tensor
    sigma: float
    settings: CertificationSettings

    def accuracy(self, labels: Tensor, radius: float = 0.0) -> Accuracy:
        """Certified accuracy: the share of images whose prediction is right and certified for ``radius`` at least.

        Args:
            labels: integers [B], the true classes.
            radius: in l2, for images in [0, 1].

        Raises:
            InputTypeError: the labels are not integers.
            InputValueError: they are not one per image.
        """
        return Accuracy.mean(self._right(check_seeds(labels, len(self.prediction), "labels")) & (self.radius >= radius))

    def to_tsv(self, labels: Tensor) -> str:
        """A line per image with the columns ``COLUMNS``, tabs between them; labels and errors as for ``accuracy``."""
        labels = check_seeds(labels, len(self.prediction), "labels")
        fields = (self.indices, labels, self.prediction, self.radius, self._right(labels), self.seconds)
        lines = ["\t".join(COLUMNS)]
        for index, label, predicted, radius, right, seconds in zip(*(part.tolist() for part in fields), strict=True):
            time = datetime.timedelta(seconds=seconds)
            shown = math.floor(radius * 1e6) / 1e6  # never more than is certified
            lines.append(f"{index}\t{label}\t{predicted}\t{shown:.6f}\t{int(right)}\t{time}")
        return "\n".join(lines) + "\n"

    def _right(self, labels: Tensor) -> Tensor:
        """[B] bool; an abstention is never right."""
        return (self.prediction == labels) & ~self.abstained

    def _about(self) -> str:
        settings = self.settings
        counts = f"n0 = {settings.n0:,}, n = {settings.n:,}, alpha = {settings.alpha:g}"
        return f"{len(self.radius)} images, sigma = {self.sigma:g}, {counts}"

    def _repr_markdown_(self) -> str:
        """How many images have each radius, which notebooks show formatted."""
        rows = [["l2 radius", "share of images that have it, right or wrong"]]
        rows += [[f"{radius:g}", str(Accuracy.mean(~self.abstained & (self.radius >= radius)))] for radius in RADII]
        head = f"Certificates of {self._about()}; {int(self.abstained.sum())} abstained."
        return f"{head}\n\n{markdown_table(rows)}\n\n`.accuracy(labels, radius)` is certified accuracy."

    def __repr__(self) -> str:
        shares = ", ".join(
            f"{(self.radius >= radius).double().mean().item():.3f} at {radius:g}" for radius in RADII[1:]
        )
        return (
            f"CertificationResult({self._about()}\n  abstained: {int(self.abstained.sum())}\n  l2 radius: median "
            f"{self.radius.median().item():.4g}, largest {self.radius.max().item():.4g}\n"
            f"  share of images that have a radius, right or wrong: {shares}\n"
            "  of the smoothed classifier; .accuracy(labels, radius) is certified accuracy)"
        )
