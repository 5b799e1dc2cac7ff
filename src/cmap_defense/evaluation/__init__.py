"""How robust a model is: attacked, judged afresh, checked, reported."""

from cmap_defense.evaluation.accuracy import Accuracy, wilson_interval
from cmap_defense.evaluation.demo import Demonstration, demonstrate
from cmap_defense.evaluation.evaluation import Evaluation
from cmap_defense.evaluation.protocol import Protocol, Subset
from cmap_defense.evaluation.report import Report
from cmap_defense.evaluation.run import evaluate

__all__ = [
    "Accuracy",
    "Demonstration",
    "Evaluation",
    "Protocol",
    "Report",
    "Subset",
    "demonstrate",
    "evaluate",
    "wilson_interval",
]
