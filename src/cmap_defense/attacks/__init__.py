"""Attacks: one interface, one attack a file."""

from cmap_defense.attacks.apgd import APGD
from cmap_defense.attacks.autoattack import AutoAttack
from cmap_defense.attacks.base import Attack, AttackResult, Candidates
from cmap_defense.attacks.consistency_disruption import ConsistencyDisruption
from cmap_defense.attacks.frozen_residual import FrozenResidual
from cmap_defense.attacks.goal import CrossEntropy, Goal, Loss, Margin, VoteMargin
from cmap_defense.attacks.latent import LatentAttack
from cmap_defense.attacks.oracle import Feedback, Model, Oracle, SeededModel
from cmap_defense.attacks.overpowered import Overpowered
from cmap_defense.attacks.pgd import PGD
from cmap_defense.attacks.short_cmap import ShortCMAP
from cmap_defense.attacks.spsa import SPSA
from cmap_defense.attacks.square import Square
from cmap_defense.attacks.steps import StepAttack
from cmap_defense.attacks.suites import SUITES, exact_suite, full_suite, paper_suite, standard_suite, suite
from cmap_defense.attacks.target_steer import TargetSteer
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
    "standard_suite",
    "suite",
]
