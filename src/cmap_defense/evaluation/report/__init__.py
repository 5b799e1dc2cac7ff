"""What an evaluation found: as objects, as JSON, as Markdown and as a page."""

from cmap_defense.evaluation.report.facts import Report, build_report

__all__ = ["Report", "build_report"]
