"""The three files of a report: for programs, for reviews, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmap_defense.errors import EvaluationError, MissingExtraError
from cmap_defense.evaluation.report.markdown import markdown
from cmap_defense.evaluation.store import Store, write_text

__all__ = ["load_facts", "write_report"]


def write_report(facts: Mapping[str, Any], folder: Path) -> tuple[list[Path], str | None]:
    """``report.json``, ``report.md`` and, where the extra ``[report]`` is installed, ``report.html``.

    Args:
        facts: what :meth:`Report.to_dict` gives.
        folder: that of the evaluation.

    Returns:
        The files written, and what is missing for the page, if anything is.
    """
    written = [folder / "report.json", folder / "report.md"]
    write_text(written[0], json.dumps(facts, indent=1, allow_nan=False) + "\n")
    write_text(written[1], markdown(facts))
    try:
        from cmap_defense.evaluation.report.page import page

        text = page(facts, Store(folder))
    except MissingExtraError as error:
        return written, str(error)
    write_text(folder / "report.html", text)
    return [*written, folder / "report.html"], None


def load_facts(folder: Path) -> dict[str, Any]:
    """What ``report.json`` holds.

    Raises:
        EvaluationError: it is not there, or is something else.
    """
    path = folder / "report.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read: {error}. It is written when an evaluation has ended: "
            "give its command again to go on."
        ) from error
    if not isinstance(facts, dict) or "rows" not in facts or "headline" not in facts:
        raise EvaluationError(f"{path} is no report of an evaluation.")
    if facts["headline"] is not None and "by_image" not in facts["headline"]:
        raise EvaluationError(
            f"{path} was written by another version of this package. Give the command of its evaluation again: what is "
            "done is not done again, and the report is written anew."
        )
    return facts
