"""How robust a model is: attacked, re-evaluated with independent noise, checked, reported."""

from typing import TYPE_CHECKING

from cmap_defense.common.optional import lazy_names
from cmap_defense.data.subset import Subset
from cmap_defense.evaluation.protocol import Protocol

if TYPE_CHECKING:
    from cmap_defense.common.statistics import Accuracy, wilson_interval
    from cmap_defense.evaluation.comparison import Comparison, compare, write_comparison
    from cmap_defense.evaluation.differences import Difference, paired_differences
    from cmap_defense.evaluation.evaluation import Evaluation, evaluate
    from cmap_defense.evaluation.report import Report

__all__ = [
    "Accuracy",
    "Comparison",
    "Difference",
    "Evaluation",
    "Protocol",
    "Report",
    "Subset",
    "compare",
    "evaluate",
    "paired_differences",
    "wilson_interval",
    "write_comparison",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, __all__, "..common.statistics", ".comparison", ".differences", ".evaluation", ".report"
    )
