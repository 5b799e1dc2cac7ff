"""Accuracies with intervals, and the demonstration's measurement."""

from cmap_defense.evaluation.accuracy import Accuracy, wilson_interval
from cmap_defense.evaluation.demo import Demonstration, demonstrate

__all__ = ["Accuracy", "Demonstration", "demonstrate", "wilson_interval"]
