"""Purification defences, one a file: images in, a PurificationResult out."""

from cmap_defense.purifiers.base import Purifier
from cmap_defense.purifiers.cmap import CMAP
from cmap_defense.purifiers.one_step import OneStep

__all__ = ["CMAP", "OneStep", "Purifier"]
