"""Attacks: one interface, families of attacks in files of their own."""

from cmap_defense.attacks.autoattack import AutoAttack
from cmap_defense.attacks.base import Attack, AttackResult, Candidates
from cmap_defense.attacks.consistency_disruption import ConsistencyDisruption
from cmap_defense.attacks.defended import FrozenResidual, ShortCMAP, TargetSteer
from cmap_defense.attacks.goal import CrossEntropy, Goal, Loss, Margin, VoteMargin
from cmap_defense.attacks.latents import LatentAttack, Overpowered
from cmap_defense.attacks.libraries import APGD, Square
from cmap_defense.attacks.oracle import Feedback, Model, Oracle, SeededModel
from cmap_defense.attacks.precomputed import Precomputed
from cmap_defense.attacks.steps import PGD, SPSA, StepAttack, random_point
from cmap_defense.attacks.suites import SUITES, exact_suite, full_suite, paper_suite, standard_suite, suite
from cmap_defense.attacks.transfer import NoiseAndDenoise, Shortened, Source, Transfer, Undefended
from cmap_defense.threat import ThreatModel

__all__ = [
    "APGD",
    "PGD",
    "SPSA",
    "SUITES",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Candidates",
    "ConsistencyDisruption",
    "CrossEntropy",
    "Feedback",
    "FrozenResidual",
    "Goal",
    "LatentAttack",
    "Loss",
    "Margin",
    "Model",
    "NoiseAndDenoise",
    "Oracle",
    "Overpowered",
    "Precomputed",
    "SeededModel",
    "ShortCMAP",
    "Shortened",
    "Source",
    "Square",
    "StepAttack",
    "TargetSteer",
    "ThreatModel",
    "Transfer",
    "Undefended",
    "VoteMargin",
    "exact_suite",
    "full_suite",
    "paper_suite",
    "random_point",
    "standard_suite",
    "suite",
]
