"""cmap-defense: consistency-model adversarial purification (CMAP) for PyTorch image classifiers.

::

    from cmap_defense import PurifiedClassifier

    model = PurifiedClassifier(my_classifier, backbone="fashion-mnist-ct")
    logits = model(images)
"""

from cmap_defense.backbones.load import load_backbone
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.errors import CmapError
from cmap_defense.results import History, PurificationResult

__all__ = ["CMAPSettings", "CmapError", "History", "PurificationResult", "PurifiedClassifier", "load_backbone"]

__version__ = "0.1.0"
"""Also that of the distribution: the build reads it from here."""
