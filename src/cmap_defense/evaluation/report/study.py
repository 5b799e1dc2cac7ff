"""A study as Markdown and as a plot, from its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmap_defense.errors import MissingExtraError
from cmap_defense.evaluation.report.markdown import accuracy, table
from cmap_defense.evaluation.store import write_text

__all__ = ["study_markdown", "write_study"]

Facts = Mapping[str, Any]


def study_markdown(facts: Facts) -> str:
    """The text of ``study.md`` from what :meth:`StudyResult.to_dict` gives."""
    head = [facts["axis"], "attack", "one answer", "vote", "re-purified", "one latent"]
    rows = [
        [
            entry["variant"] if entry["value"] is None else f"{entry['value']:.4g}",
            entry["attack"],
            *(accuracy(entry["row"][name]) for name in ("average", "vote", "repurified")),
            "" if entry["row"]["one_latent"] is None else f"{entry['row']['one_latent']:.3f}",
        ]
        for entry in facts["rows"]
    ]
    first = next(iter(facts["settings"].values()))
    protocol, loop = first["protocol"], first["models"]["defended"]["settings"]
    told = (
        f"{first['data']['count']} images, K = {loop['n_latents']}, N = {loop['iterations']} where not varied; "
        f"*one answer* is the mean of {protocol['answers']}, *vote* theirs, *re-purified* the mean of "
        f"{protocol['repurifications']} others; 95 % Wilson intervals on the images."
    )
    return f"# {facts['title']}\n\n{told}\n\n{table(head, rows)}\n"


def write_study(facts: Facts, folder: Path) -> tuple[list[Path], str | None]:
    """``study.json``, ``study.md`` and, where the extra ``[report]`` is installed, ``study.svg``.

    Returns:
        The files written, and what is missing for the plot, if anything is.
    """
    written = [folder / "study.json", folder / "study.md"]
    write_text(written[0], json.dumps(facts, indent=1, allow_nan=False) + "\n")
    write_text(written[1], study_markdown(facts))
    try:
        from cmap_defense.evaluation.report.study_plot import study_plot

        drawn = study_plot(facts)
    except MissingExtraError as error:
        return written, str(error)
    write_text(folder / "study.svg", drawn)
    return [*written, folder / "study.svg"], None
