"""The figures of a backbone's quality as tables, and the files ``quality.json`` and ``quality.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmap_defense.evaluation.report.markdown import accuracy, table
from cmap_defense.evaluation.store import write_text

__all__ = ["accuracy_rows", "distance_rows", "quality_markdown", "told", "write_quality"]

Facts = Mapping[str, Any]

JUDGED = {
    "clean": "clean",
    "purified": "purified",
    "attacked": "attacked",
    "attacked_purified": "attacked, purified",
}
"""What is counted, and the heading of its column."""


def quality_markdown(facts: Facts) -> str:
    """The text of ``quality.md`` from what :meth:`Quality.to_dict` gives."""
    parts = [f"# Quality of {facts['backbone']}", "## Samples"]
    head, *rows = distance_rows(facts)
    parts += [table(head, rows), *told(facts)["samples"], "## Purified images"]
    head, *rows = accuracy_rows(facts)
    parts += [*told(facts)["purified"], table(head, rows), *told(facts)["attack"]]
    return "\n\n".join(parts) + "\n"


def distance_rows(facts: Facts) -> list[list[str]]:
    """A heading and the distances between samples and real images; those that could not be had say "none"."""
    frechet, fid = facts["frechet"], facts["fid"]
    rows = [["distance", "between", "images", "value"]]
    if frechet is None:
        rows.append([f"Frechet distance in features of {facts['classifier']}", "", "", "none"])
    else:
        sets = f"{frechet['images']} and {frechet['images']}"
        rows.append([frechet["name"], "samples and real images", sets, f"{frechet['samples']:.4g}"])
        rows.append([frechet["name"], "two halves of real images", sets, f"{frechet['halves']:.4g}"])
    if fid is None:
        rows.append(["FID", "", "", "none"])
    else:
        sets = f"{fid['samples']} and {fid['real']}"
        rows.append(["FID", "samples and real images", sets, f"{fid['value']:.4g}"])
    return rows


def accuracy_rows(facts: Facts) -> list[list[str]]:
    """A heading and the accuracies of each classifier, with their 95 % intervals."""
    return [["classifier", *JUDGED.values()]] + [
        [name, *(accuracy(found[kind]) for kind in JUDGED)] for name, found in facts["classifiers"].items()
    ]


def told(facts: Facts) -> dict[str, list[str]]:
    """What stands beside the tables, by place, a sentence or two each."""
    frechet, fid, near = facts["frechet"], facts["fid"], facts["reconstructions"]
    samples = []
    if frechet is None:
        samples.append(f"No Frechet distance: {facts['frechet_reason']}")
    else:
        samples.append(
            f"The features are the {frechet['numbers']} numbers that come into {frechet['module']!r}. The distance is "
            "no FID, and can be compared only with distances in the same features between as many images; that of two "
            "halves of real images is what their number alone makes of it."
        )
    samples.append(f"No FID: {facts['fid_reason']}" if fid is None else f"FID has its features from {fid['source']}.")
    settings = facts["settings"]
    return {
        "samples": samples,
        "purified": [
            f"{near['images']} clean images, purified with K = {settings['n_latents']}, N = {settings['iterations']}: "
            f"mean L1 {near['l1']:.4f} per pixel of images in [0, 1], mean SSIM {near['ssim']:.3f}."
        ],
        "attack": [
            "Clean and attacked images are judged by the bare classifier, purified ones by the vote of their K "
            "versions. Accuracies have 95 % Wilson intervals.",
            f"The attack is {facts['attack']}, made on each bare classifier: {facts['attacker']}. This shows how the "
            "defence works, not how robust it is.",
        ],
    }


def write_quality(facts: Facts, folder: Path) -> list[Path]:
    """Write ``quality.json`` and ``quality.md``."""
    written = [folder / "quality.json", folder / "quality.md"]
    write_text(written[0], json.dumps(facts, indent=1, allow_nan=False) + "\n")
    write_text(written[1], quality_markdown(facts))
    return written
