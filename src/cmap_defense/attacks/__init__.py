"""Attacks: one interface, one attack a file."""

from cmap_defense.attacks.base import Attack, AttackResult
from cmap_defense.attacks.pgd import PGD
from cmap_defense.threat import ThreatModel

__all__ = ["PGD", "Attack", "AttackResult", "ThreatModel"]
