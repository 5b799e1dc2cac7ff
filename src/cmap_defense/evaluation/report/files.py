"""The three files of a report: for programs, for reviews, for people."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from cmap_defense.common.files import write_findings
from cmap_defense.errors import EvaluationError
from cmap_defense.evaluation.report.page import page
from cmap_defense.evaluation.report.report import Report
from cmap_defense.evaluation.report.tables import markdown
from cmap_defense.evaluation.results import ResultsFolder


def write_report(report: Report, folder: Path) -> tuple[list[Path], str | None]:
    """``report.json``, ``report.md`` and, where the extra ``[report]`` is installed, ``report.html``.

    Args:
        report: of an evaluation.
        folder: that of the evaluation.

    Returns:
        The files written, and what is missing for the page, if anything is.
    """
    page_of = functools.partial(page, report, ResultsFolder(folder))
    return write_findings(folder, "report", report.to_dict(), markdown(report), page_of, "report.html")


def load_report(folder: Path) -> Report:
    """What ``report.json`` holds.

    Raises:
        EvaluationError: it is not there, or is something else.
    """
    path = folder / "report.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read: {error}. It is written when an evaluation has ended: "
            "give its command again to go on."
        ) from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{path} is no report of an evaluation.")
    try:
        return Report.from_dict(values)
    except EvaluationError as error:
        raise EvaluationError(f"{path}: {error}") from error
