"""The figures of a backbone's quality as tables, and the files ``quality.json`` and ``quality.md``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmap_defense.common.files import write_json, write_text
from cmap_defense.common.statistics import Accuracy
from cmap_defense.common.tables import Table, markdown_page, markdown_table

KINDS = {
    "clean": "clean",
    "purified": "purified",
    "attacked": "attacked",
    "attacked_purified": "attacked, purified",
}
"""Accuracies, and the headings of their columns."""


def quality_markdown(quality: Mapping[str, Any]) -> str:
    """The text of ``quality.md`` from what ``Quality.to_dict`` gives."""
    parts = []
    for title, before, table, after in sections(quality):
        parts += [f"## {title}", *before, markdown_table(table), *after]
    return markdown_page(f"Quality of {quality['backbone']}", *parts)


def distance_rows(quality: Mapping[str, Any]) -> list[list[str]]:
    """A heading and the distances between samples and real images; those that are not available say "none"."""
    frechet, fid = quality["frechet"], quality["fid"]
    rows = [["distance", "between", "images", "value"]]
    if frechet is None:
        rows.append([f"Frechet distance in features of {quality['classifier']}", "", "", "none"])
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


def accuracy_rows(quality: Mapping[str, Any]) -> list[list[str]]:
    """A heading and the accuracies of each classifier, with their 95 % intervals."""
    return [["classifier", *KINDS.values()]] + [
        [name, *(str(Accuracy.from_dict(found[kind])) for kind in KINDS)]
        for name, found in quality["classifiers"].items()
    ]


def sections(quality: Mapping[str, Any]) -> list[tuple[str, list[str], Table, list[str]]]:
    """The tables, each with its title and the sentences before and after it."""
    frechet, fid, near = quality["frechet"], quality["fid"], quality["reconstructions"]
    if frechet is None:
        about = f"No Frechet distance: {quality['frechet_reason']}"
    else:
        about = (
            f"The features are the {frechet['numbers']} numbers that come into {frechet['module']!r}. The distance is "
            "no FID, and can be compared only with distances in the same features between as many images; that of two "
            "halves of real images is what their number alone makes of it."
        )
    source = f"No FID: {quality['fid_reason']}" if fid is None else f"FID has its features from {fid['source']}."
    settings = quality["settings"]
    purified = (
        f"{near['images']} clean images, purified with K = {settings['n_latents']}, N = {settings['iterations']}: "
        f"mean L1 {near['l1']:.4f} per pixel of images in [0, 1], mean SSIM {near['ssim']:.3f}."
    )
    attack = [
        "Clean and attacked images are classified by the undefended classifier, purified ones by the vote of their K "
        "versions. Accuracies have 95 % Wilson intervals.",
        f"The attack is {quality['attack']}, made on each undefended classifier: {quality['attacker']}. This shows how "
        "the defence works, not how robust it is.",
    ]
    return [
        ("Samples", [], distance_rows(quality), [about, source]),
        ("Purified images", [purified], accuracy_rows(quality), attack),
    ]


def write_quality(quality: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``quality.json`` and ``quality.md``."""
    written = [folder / "quality.json", folder / "quality.md"]
    write_json(written[0], quality)
    write_text(written[1], quality_markdown(quality))
    return written
