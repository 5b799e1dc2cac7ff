"""Converters from the formats in which consistency models were published."""

from cmap_defense.backbones.convert.jcm import convert_jcm
from cmap_defense.backbones.convert.openai import convert_openai

__all__ = ["convert_jcm", "convert_openai"]
