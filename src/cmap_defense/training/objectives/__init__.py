"""Training objectives, one a file; each is a pure function of what the loop drew."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cmap_defense.training.objectives.base import MODELS, Batch, Denoise, Model, Objective, heun_step
from cmap_defense.training.objectives.cd import CD
from cmap_defense.training.objectives.ct import CT
from cmap_defense.training.objectives.distances import LPIPS
from cmap_defense.training.objectives.ect import ECT
from cmap_defense.training.objectives.edm import EDM
from cmap_defense.training.objectives.ict import ICT

__all__ = [
    "CD",
    "CT",
    "ECT",
    "EDM",
    "ICT",
    "LPIPS",
    "MODELS",
    "OBJECTIVES",
    "Batch",
    "Denoise",
    "Model",
    "Objective",
    "heun_step",
]

OBJECTIVES: Mapping[str, type[Objective]] = MappingProxyType({kind.name: kind for kind in (EDM, CT, ICT, ECT, CD)})
"""The objectives by name. "cd" needs ``teacher`` and ``teacher_source``."""
