"""Certified accuracy: the l2 radius within which a smoothed classifier provably keeps its prediction."""

from typing import TYPE_CHECKING

from cmap_defense.certification.settings import CertificationSettings
from cmap_defense.common.optional import lazy_names

if TYPE_CHECKING:
    from cmap_defense.certification.bounds import certified_radii, lower_bounds
    from cmap_defense.certification.results import CertificationResult
    from cmap_defense.certification.run import Cost, certify, expected_cost
    from cmap_defense.certification.smoothed import SmoothedClassifier

__all__ = [
    "CertificationResult",
    "CertificationSettings",
    "Cost",
    "SmoothedClassifier",
    "certified_radii",
    "certify",
    "expected_cost",
    "lower_bounds",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, __all__, ".bounds", ".results", ".smoothed", ".run")
