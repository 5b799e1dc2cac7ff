"""What a backbone is trained to minimise: one objective a file, each a pure function of what the loop drew."""

from cmap_defense.training.objectives.base import Batch, Denoise, Objective
from cmap_defense.training.objectives.ect import ECT, ECTSettings

__all__ = ["ECT", "Batch", "Denoise", "ECTSettings", "Objective"]
