"""Certified accuracy of several smoothed classifiers: the file ``certified.json``, its table, and what it may mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cmap_defense.certification.results import RADII, CertificationResult
from cmap_defense.common.paths import expanded
from cmap_defense.errors import EvaluationError

FILE = "certified.json"

MEANING = (
    "Certified accuracy is the share of images whose class is right and provably the same for every change up to that "
    "l2 radius, whatever the attack: a lower bound, of the smoothed classifier, in l2 alone, except with probability "
    "alpha for each image."
)

PUBLISHED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "cifar10": {
        "none (Salman et al. 2020)": (7, 3, 0, 0),
        "denoiser, full access (Salman et al. 2020)": (56, 41, 28, 19),
        "none, trained with noise (Cohen et al. 2019)": (60, 43, 32, 23),
    }
}
"""By data set: published certified accuracy in % at the radii above 0 (arXiv 2003.01908 and 1902.02918), each at the
best sigma, with other classifiers."""


def summary_of(results: Mapping[str, tuple[str | None, CertificationResult]], labels: Tensor) -> list[dict[str, Any]]:
    """Results as JSON: by name, the denoiser's name (None for none) and the certificates; with the true labels [B]."""
    return [
        {
            "name": name,
            "denoiser": denoiser,
            "sigma": result.sigma,
            "settings": result.settings.to_dict(),
            "images": len(labels),
            "abstained": int(result.abstained.sum()),
            "accuracy": [{"radius": radius, **result.accuracy(labels, radius).to_dict()} for radius in RADII],
            "passes": int(result.passes.sum()),
            "seconds": round(result.seconds.sum().item(), 3),
        }
        for name, (denoiser, result) in results.items()
    ]


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the first being the heading: certified accuracy in %, with 95 % intervals, by radius."""
    rows = [["denoiser", "sigma", "abstains", *(f"r = {radius:g}" for radius in RADII)]]
    for one in summary["certificates"]:
        shares = [[100 * share for share in (at["value"], *at["interval"])] for at in one["accuracy"]]
        cells = ["{:.0f} [{:.0f}, {:.0f}]".format(*share) for share in shares]
        rows.append([one["denoiser"] or "none", f"{one['sigma']:g}", str(one["abstained"]), *cells])
    for name, values in summary["published"].items():
        rows.append([f"published: {name}", "best", "", "", *map(str, values)])
    return rows


def read_summary(folder: str | Path) -> dict[str, Any]:
    """The certificates in a folder of ``cmap-defense certify``. Raises ``EvaluationError`` where there are none."""
    path = expanded(folder) / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} cannot be read: {error!r}. Give the folder of cmap-defense certify, when it has ended."
        ) from error
    return found
