"""Training backbones: objectives, networks by name, averaged weights, data order, checkpoints, the loop."""

from typing import TYPE_CHECKING

from cmap_defense.lazy import lazy_names
from cmap_defense.training.settings import Execution, TrainSettings

if TYPE_CHECKING:
    from cmap_defense.training.budget import Budget
    from cmap_defense.training.loop import Trained, TrainState, train
    from cmap_defense.training.networks import NETWORKS, Network
    from cmap_defense.training.objectives import ECT, OBJECTIVES, ECTSettings, Objective
    from cmap_defense.training.run import TrainedBackbone, train_backbone

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

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {"Budget": "cmap_defense.training.budget"}
        | dict.fromkeys(("TrainState", "Trained", "train"), "cmap_defense.training.loop")
        | dict.fromkeys(("NETWORKS", "Network"), "cmap_defense.training.networks")
        | dict.fromkeys(("ECT", "OBJECTIVES", "ECTSettings", "Objective"), "cmap_defense.training.objectives")
        | dict.fromkeys(("TrainedBackbone", "train_backbone"), "cmap_defense.training.run"),
    )
