"""The three files of a study: ``study.json``, ``study.md``, ``study.svg``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmap_defense.common.files import write_findings
from cmap_defense.common.statistics import Accuracy
from cmap_defense.common.tables import markdown_table
from cmap_defense.plots.studies import study_plot

MEASURES = {"average": "one prediction", "vote": "vote", "reevaluated": "re-evaluated"}
"""Accuracies that are shown, and the headings of their columns."""


def study_rows(study: Mapping[str, Any]) -> list[list[str]]:
    """Headings, and a row for each variant and attack, from what ``run_study`` gives."""
    rows = [[study["axis"], "attack", *MEASURES.values(), "one latent"]]
    for entry in study["rows"]:
        shown = [str(Accuracy.from_dict(entry["row"][name])) for name in MEASURES]
        value = entry["variant"] if entry["value"] is None else f"{entry['value']:.4g}"
        latent = entry["row"]["one_latent"]
        rows.append([value, entry["attack"], *shown, "" if latent is None else f"{latent:.3f}"])
    return rows


def study_markdown(study: Mapping[str, Any]) -> str:
    """The text of ``study.md`` from what ``run_study`` gives."""
    head, *rows = study_rows(study)
    first = next(iter(study["settings"].values()))
    protocol, loop = first["protocol"], first["models"]["defended"]["settings"]
    text = (
        f"{first['data']['count']} images, K = {loop['n_latents']}, N = {loop['iterations']} where not varied. "
        f"One prediction: the mean of {protocol['predictions']}. Vote: theirs. Re-evaluated: the mean of "
        f"{protocol['reevaluations']} others. In square brackets: 95 % Wilson intervals on the images."
    )
    return f"# {study['title']}\n\n{text}\n\n{markdown_table(head, rows)}\n"


def write_study(study: Mapping[str, Any], folder: Path) -> tuple[list[Path], str | None]:
    """``study.json``, ``study.md`` and, where the extra ``[report]`` is installed, ``study.svg``.

    Returns:
        The files written, and what is missing for the plot, if anything is.
    """
    drawn = functools.partial(study_plot, study)
    return write_findings(folder, "study", study, study_markdown(study), drawn, "study.svg")
