"""Reproduction of arXiv 2412.08394: its studies, each of which varies one thing and keeps the rest."""

from cmap_defense.paper.studies import STUDIES, Study, Variant, make_study, run_study, study_markdown, write_study

__all__ = [
    "STUDIES",
    "Study",
    "Variant",
    "make_study",
    "run_study",
    "study_markdown",
    "write_study",
]
