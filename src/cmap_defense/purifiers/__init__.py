"""Purification defences, one a file: images in, a PurificationResult out."""

from cmap_defense.purifiers.base import Purifier
from cmap_defense.purifiers.cmap import CMAP

__all__ = ["CMAP", "Purifier"]
