"""cmap-defense: consistency-model adversarial purification (CMAP) for PyTorch image classifiers.

    from cmap_defense import PurifiedClassifier

    model = PurifiedClassifier(my_classifier, backbone="fashion-mnist-ct")
    logits = model(images)

Names are imported when they are first used: ``import cmap_defense`` alone does not import torch.
"""

from typing import TYPE_CHECKING

from cmap_defense.common.optional import lazy_names

if TYPE_CHECKING:
    from cmap_defense import (
        adaptation,
        attacks,
        backbones,
        certification,
        data,
        evaluation,
        gradients,
        purifiers,
        training,
    )
    from cmap_defense.adaptation.run import adapt, load_adapted
    from cmap_defense.backbones.load import load_backbone
    from cmap_defense.certification.run import certify
    from cmap_defense.certification.smoothed import SmoothedClassifier
    from cmap_defense.classifier.wrapper import PurifiedClassifier
    from cmap_defense.cmap.settings import CMAPSettings
    from cmap_defense.errors import CmapError
    from cmap_defense.evaluation.evaluation import evaluate
    from cmap_defense.purifiers.cmap import CMAP
    from cmap_defense.results import History, PurificationResult
    from cmap_defense.threat import ThreatModel

__version__ = "0.1.0"
"""Also that of the distribution: the build reads it from here."""

__all__ = [
    "CMAP",
    "CMAPSettings",
    "CmapError",
    "History",
    "PurificationResult",
    "PurifiedClassifier",
    "SmoothedClassifier",
    "ThreatModel",
    "adapt",
    "adaptation",
    "attacks",
    "backbones",
    "certification",
    "certify",
    "data",
    "evaluate",
    "evaluation",
    "gradients",
    "load_adapted",
    "load_backbone",
    "purifiers",
    "training",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        ".errors",
        ".threat",
        ".cmap",
        ".results",
        ".backbones",
        ".purifiers",
        ".classifier",
        ".certification",
        ".adaptation",
        ".evaluation",
        ".gradients",
        ".attacks",
        ".data",
        ".training",
    )
