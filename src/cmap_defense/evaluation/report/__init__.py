"""What an evaluation found: as objects, as JSON, as Markdown and as a page."""

from cmap_defense.evaluation.report.page import load_report, write_report
from cmap_defense.evaluation.report.report import Report, build_report

__all__ = ["Report", "build_report", "load_report", "write_report"]
