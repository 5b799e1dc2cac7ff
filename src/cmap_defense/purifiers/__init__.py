"""Purification defences, one a file: images in, a PurificationResult out."""

from cmap_defense.purifiers.adp import ADP
from cmap_defense.purifiers.base import Purifier
from cmap_defense.purifiers.chain import Chain
from cmap_defense.purifiers.cmap import CMAP
from cmap_defense.purifiers.diffpure import DiffPure
from cmap_defense.purifiers.gdmp import GDMP
from cmap_defense.purifiers.gnsp import GNSP
from cmap_defense.purifiers.identity import Identity
from cmap_defense.purifiers.likelihood_maximisation import LikelihoodMaximisation
from cmap_defense.purifiers.multi_step import MultiStepPurifier, Run, StepState
from cmap_defense.purifiers.names import by_name, from_texts
from cmap_defense.purifiers.one_step import OneStep
from cmap_defense.purifiers.pair import BackbonePair
from cmap_defense.purifiers.vp import vp_sigma

__all__ = [
    "ADP",
    "CMAP",
    "GDMP",
    "GNSP",
    "BackbonePair",
    "Chain",
    "DiffPure",
    "Identity",
    "LikelihoodMaximisation",
    "MultiStepPurifier",
    "OneStep",
    "Purifier",
    "Run",
    "StepState",
    "by_name",
    "from_texts",
    "vp_sigma",
]
