"""Training backbones: objectives, networks by name, averaged weights, data order, checkpoints, the loop."""

from cmap_defense.training.budget import Budget
from cmap_defense.training.loop import Trained, TrainState, train
from cmap_defense.training.networks import NETWORKS, Network
from cmap_defense.training.objectives import ECT, OBJECTIVES, ECTSettings, Objective
from cmap_defense.training.run import TrainedBackbone, train_backbone
from cmap_defense.training.settings import Execution, TrainSettings

__all__ = [
    "ECT",
    "NETWORKS",
    "OBJECTIVES",
    "Budget",
    "ECTSettings",
    "Execution",
    "Network",
    "Objective",
    "TrainSettings",
    "TrainState",
    "Trained",
    "TrainedBackbone",
    "train",
    "train_backbone",
]
