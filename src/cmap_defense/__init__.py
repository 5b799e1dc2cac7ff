"""cmap-defense: consistency-model adversarial purification (CMAP) for PyTorch image classifiers.

    from cmap_defense import PurifiedClassifier

    model = PurifiedClassifier(my_classifier, backbone="fashion-mnist-ct")
    logits = model(images)

Names are imported when they are first used: ``import cmap_defense`` alone does not import torch.
"""

from typing import TYPE_CHECKING, Any

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

_MODULES = {
    "CMAP": "cmap_defense.purifiers.cmap",
    "CMAPSettings": "cmap_defense.cmap.settings",
    "CmapError": "cmap_defense.errors",
    "History": "cmap_defense.results",
    "PurificationResult": "cmap_defense.results",
    "PurifiedClassifier": "cmap_defense.classifier.wrapper",
    "SmoothedClassifier": "cmap_defense.certification.smoothed",
    "ThreatModel": "cmap_defense.threat",
    "adapt": "cmap_defense.adaptation.run",
    "adaptation": "cmap_defense.adaptation",
    "attacks": "cmap_defense.attacks",
    "backbones": "cmap_defense.backbones",
    "certification": "cmap_defense.certification",
    "certify": "cmap_defense.certification.run",
    "data": "cmap_defense.data",
    "evaluate": "cmap_defense.evaluation.evaluation",
    "evaluation": "cmap_defense.evaluation",
    "gradients": "cmap_defense.gradients",
    "load_adapted": "cmap_defense.adaptation.run",
    "load_backbone": "cmap_defense.backbones.load",
    "purifiers": "cmap_defense.purifiers",
    "training": "cmap_defense.training",
}
"""Public name -> the module that defines it."""

if not TYPE_CHECKING:
    _resolve, _listed = lazy_names(__name__, _MODULES)

    def __getattr__(name: str) -> Any:
        return _resolve(name)

    def __dir__() -> list[str]:
        return _listed()
