"""The wrapper, and the parts of the defence that attacks work with."""

from cmap_defense.classifier.access import LatentAccess
from cmap_defense.classifier.hooks import Trajectory
from cmap_defense.classifier.wrapper import PurifiedClassifier

__all__ = ["LatentAccess", "PurifiedClassifier", "Trajectory"]
