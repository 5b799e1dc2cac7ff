"""Training backbones: objectives, averaged weights, data order, checkpoints, the loop."""

from cmap_defense.training.loop import TrainState, train
from cmap_defense.training.objectives import ECT, ECTSettings
from cmap_defense.training.run import train_backbone
from cmap_defense.training.settings import TrainSettings

__all__ = ["ECT", "ECTSettings", "TrainSettings", "TrainState", "train", "train_backbone"]
