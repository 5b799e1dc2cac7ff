"""Training backbones: settings, objectives, averaged weights, data order, checkpoints, the loop."""

from typing import TYPE_CHECKING

from cmap_defense.common.optional import lazy_names
from cmap_defense.training.config import TrainingConfig

if TYPE_CHECKING:
    from cmap_defense.training.learner import Learner
    from cmap_defense.training.loop import TrainState, train
    from cmap_defense.training.objectives import ECT, OBJECTIVES, Objective
    from cmap_defense.training.run import TrainedBackbone, train_backbone

__all__ = [
    "ECT",
    "OBJECTIVES",
    "Learner",
    "Objective",
    "TrainState",
    "TrainedBackbone",
    "TrainingConfig",
    "train",
    "train_backbone",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, __all__, ".objectives", ".learner", ".loop", ".run")
