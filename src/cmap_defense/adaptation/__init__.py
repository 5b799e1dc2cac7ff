"""Classifiers adapted to a purifier: fine-tuned on what it makes of training images, attacked ones included."""

from typing import TYPE_CHECKING

from cmap_defense.adaptation.config import AdaptationConfig
from cmap_defense.common.optional import lazy_names

if TYPE_CHECKING:
    from cmap_defense.adaptation.run import Adapted, adapt, load_adapted

__all__ = ["AdaptationConfig", "Adapted", "adapt", "load_adapted"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, __all__, ".run")
