"""What a backbone is trained to minimise: one objective a file, each a pure function of what the loop drew."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cmap_defense.settings import Settings
from cmap_defense.training.objectives.base import Batch, Denoise, Objective
from cmap_defense.training.objectives.cd import CD, CDSettings, heun_step
from cmap_defense.training.objectives.ct import CT, CTSettings
from cmap_defense.training.objectives.distances import LPIPS
from cmap_defense.training.objectives.ect import ECT, ECTSettings
from cmap_defense.training.objectives.edm import EDM, EDMSettings
from cmap_defense.training.objectives.ict import ICT, ICTSettings

__all__ = [
    "CD",
    "CT",
    "ECT",
    "EDM",
    "ICT",
    "LPIPS",
    "OBJECTIVES",
    "Batch",
    "CDSettings",
    "CTSettings",
    "Denoise",
    "ECTSettings",
    "EDMSettings",
    "ICTSettings",
    "Objective",
    "heun_step",
]

OBJECTIVES: Mapping[str, tuple[type[Any], type[Settings]]] = MappingProxyType(
    {
        "edm": (EDM, EDMSettings),
        "ct": (CT, CTSettings),
        "ict": (ICT, ICTSettings),
        "ect": (ECT, ECTSettings),
        "cd": (CD, CDSettings),
    }
)
"""Name -> (objective, its settings). An objective is made from its settings; "cd" needs ``teacher`` and
``teacher_name`` besides."""
