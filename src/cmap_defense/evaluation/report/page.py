"""A report as a page: one HTML file that needs nothing else, from the report and the folder with its images.

jinja2 and matplotlib are the extra ``[report]``, imported when a page is made.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmap_defense.common.files import write_findings
from cmap_defense.common.optional import optional_import
from cmap_defense.common.paths import expanded
from cmap_defense.common.statistics import Accuracy
from cmap_defense.errors import EvaluationError
from cmap_defense.evaluation.report import tables
from cmap_defense.evaluation.report.report import Report
from cmap_defense.evaluation.report.tables import attack_name, strongest
from cmap_defense.evaluation.results import ResultsFolder, WorkUnit
from cmap_defense.evaluation.tasks import CHECKS, CLEAN, DEFENDED
from cmap_defense.plots.purification import as_picture
from cmap_defense.plots.robustness import accuracy_plot, cosine_plot, curve_plot, sweep_plot

FOLLOWED = 3
"""Number of attacks, the strongest, that are drawn over the iterations of the purification."""

SAMPLED = 2
"""Number of attacks, the strongest, whose images are shown."""

CURVES = {
    "accuracy": "accuracy of the vote",
    "total": "L, the whole loss (eq. 9)",
    "l1": "L1 distance to the input (eq. 10)",
    "ssim": "SSIM with the input (eq. 10)",
    "latent": "L_d, latents from their prior (eq. 12)",
    "latent_mean": "mean of the latents' elements",
    "latent_std": "standard deviation of the latents' elements",
}
"""What is drawn over the iterations of the purification, and what it is."""

PRIOR = {"latent_mean": 0.0, "latent_std": 1.0}

Plot = tuple[str, str]
"""A data URI, and in words what it shows."""


def page(report: Report, folder: ResultsFolder) -> str:
    """The text of ``report.html``; the same for the same report and images."""
    jinja2 = optional_import("jinja2", "report", "The page of a report is made with jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files(__package__ or "").joinpath("template.html.j2").read_text(encoding="utf-8")
    headline = report.headline
    percent = "" if headline is None else f"{100 * float(f'{headline.accuracy.value:.3f}'):.1f}"  # rounded as in tables
    return environment.from_string(template).render(
        sections=tables.sections(report),
        plots=_plots(report),
        curves=_curves(report),
        about=[*tables.threats(report), f"{report.settings['data']['count']} images"],
        headline=headline,
        percent=percent,
        what=tables.HEADLINE,
        beside=_beside(report),
        samples=samples(report, folder, strongest(report)[:SAMPLED]),
        difference=DIFFERENCE,
    )


def _beside(report: Report) -> list[tuple[str, str]]:
    """What stands beside the headline: clean images, and the strongest attack on each model."""
    found = []
    for model in dict.fromkeys(row.model for row in report.rows):
        rows = {row.attack: row for row in report.rows if row.model == model}
        attacked = [row for name, row in rows.items() if name != CLEAN and row.reevaluated.total]
        worst = min(attacked, key=lambda row: row.reevaluated.value, default=None)
        found += [
            (f"{tables.model_name(model)}, {attack_name(row.attack)}", str(row.reevaluated))
            for row in (rows.get(CLEAN), worst)
            if row is not None
        ]
    return found


def _plots(report: Report) -> dict[str, list[Plot]]:
    """By section."""
    found: dict[str, list[Plot]] = {}
    rows = [
        (attack_name(row.attack) if row.model == DEFENDED else f"{row.model}: {attack_name(row.attack)}", row)
        for row in tables.ordered_rows(report)
    ]
    if rows:
        bars: list[tuple[str, Accuracy, Accuracy | None]] = [(name, row.reevaluated, row.vote) for name, row in rows]
        if report.headline is not None:
            bars.insert(0, ("all attacks: headline", report.headline.accuracy, None))
        drawn = accuracy_plot(bars, report.settings["protocol"]["predictions"])
        described = "; ".join(f"{name} {accuracy}" for name, accuracy, _ in bars)
        found["accuracy"] = [_plot(drawn, f"Re-evaluated accuracy with 95 % intervals. {described}")]
    task = report.settings["tasks"].get(f"{CHECKS}/gradients", {}).get("attack") or {}
    threat = task.get("threat") or {}
    own = {"eps": threat.get("eps"), "steps": task.get("steps")}
    for sweep in report.sweeps:
        sizes = sweep.name == "eps"
        any_image = sizes and f"{CHECKS}/eps-any" in report.settings["tasks"]
        axis = f"eps ({threat['norm']})" if sizes and threat else sweep.name
        drawn = sweep_plot(
            sweep.name, sweep.values, sweep.accuracies, sweep.errors,
            axis=axis, own=own.get(sweep.name), any_image=any_image,
        )  # fmt: skip
        found[sweep.name] = [_plot(drawn, f"Accuracy over {axis}; the table has the numbers")]
    if report.gradients:
        found["gradients"] = [_plot(cosine_plot(report.gradients), "Cosine over the number of gradients averaged")]
    return found


def _curves(report: Report) -> list[Plot]:
    """Plots over the iterations of the purification, for clean images and the strongest attacks."""
    names = [CLEAN, *strongest(report)][: 1 + FOLLOWED]
    curves = {name: report.curves[f"{DEFENDED}/{name}"] for name in names if f"{DEFENDED}/{name}" in report.curves}
    found = []
    for name, label in CURVES.items():
        lines = {
            attack_name(attack): (curve["iterations"] if name == "accuracy" else range(len(curve[name])), curve[name])
            for attack, curve in curves.items()
            if curve.get(name) and (name != "accuracy" or curve["iterations"])
        }
        if lines:
            ends = "; ".join(f"{attack} from {y[0]:.4g} to {y[-1]:.4g}" for attack, (_, y) in lines.items())
            drawn = curve_plot(lines, label, share=name == "accuracy", prior=PRIOR.get(name))
            found.append(_plot(drawn, f"{label}, from the first to the last iteration: {ends}"))
    return found


def _plot(drawn: bytes, words: str) -> Plot:
    return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode("ascii"), words


DIFFERENCE = 10
"""Differences are shown this many times as large, around middle grey."""

LARGEST = 128
"""Larger pictures are reduced to this many pixels, so that a page stays a page."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image in the page: a data URI, what it shows in words, and its size in pixels."""

    source: str
    alt: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image of the data set: by attack, the clean image first, its pictures by what they show (see ``samples``),
    the name of the predicted class and whether it is right.
    """

    position: int
    label: str
    pictures: Mapping[str, Mapping[str, Picture]]
    predicted: Mapping[str, str]
    right: Mapping[str, bool]


def samples(report: Report, folder: ResultsFolder, attacks: Sequence[str], count: int = 6) -> list[Sample]:
    """The first images of the first run: clean, and what each attack made of them; none where they are not there.

    Pictures are "image", "difference" (from the clean image) and "purified" (where the model purifies). The prediction
    is the first one for that image: where the model purifies, its vote.
    """
    protocol, names = report.settings["protocol"], report.class_names
    groups = range(-(-min(count, report.settings["data"]["count"]) // protocol["group"]))
    found = {}
    for attack in (CLEAN, *attacks):
        units = [WorkUnit(f"{DEFENDED}/{attack}", protocol["seeds"][0], group) for group in groups]
        lines, tensors = _first(folder, units, count)
        if lines and "images" in tensors:
            found[attack] = lines, tensors
    if CLEAN not in found:
        return []
    clean_lines, clean = found[CLEAN]
    made = []
    for row, line in enumerate(clean_lines):
        label = class_name(line["label"], names)
        about = f"image {line['image']}, {label}"
        pictures, predicted, right = {}, {}, {}
        for attack, (lines, tensors) in found.items():
            first = lines[row]["predictions"][0]
            words = "clean" if attack == CLEAN else f"attacked by {attack}"
            own = {"image": picture(tensors["images"][row], f"{about}: {words}")}
            if attack != CLEAN:
                change = (tensors["images"][row] - clean["images"][row]) * DIFFERENCE + 0.5
                own["difference"] = picture(change, f"{about}: what {attack} changed, {DIFFERENCE} times")
            if "purified" in tensors:
                text = f"{about}: purified, {words}, predicted {class_name(first, names)}"
                own["purified"] = picture(tensors["purified"][row], text)
            pictures[attack], predicted[attack] = own, class_name(first, names)
            right[attack] = first == line["label"]
        made.append(Sample(line["image"], label, pictures, predicted, right))
    return made


def picture(image: Tensor, alt: str) -> Picture:
    """An image [C, H, W], float in [0, 1] (clamped) or uint8, as PNG; with C other than 1 and 3 the mean over C."""
    values = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if values.shape[0] not in (1, 3):
        values = values.mean(dim=0, keepdim=True)
    shown = as_picture(values)
    shown.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(source, alt, shown.width, shown.height)


def class_name(number: int, names: Sequence[str] | None) -> str:
    """A class by its name, or by its number where that is not known."""
    return names[number] if names is not None and 0 <= number < len(names) else f"class {number}"


def _first(
    folder: ResultsFolder, units: Sequence[WorkUnit], count: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Lines and tensors of the first images; tensors that not all work units have are left out."""
    if not all(folder.done(unit) for unit in units):
        return [], {}
    lines = [line for unit in units for line in folder.lines(unit)]
    parts = [folder.tensors(unit) for unit in units]
    shared = [name for name in ("images", "purified") if all(name in part for part in parts)]
    return lines[:count], {name: torch.cat([part[name] for part in parts])[:count] for name in shared}


def write_report(report: Report, folder: str | Path) -> tuple[list[Path], str | None]:
    """``report.json``, ``report.md`` and, where the extra ``[report]`` is installed, ``report.html``: the files written
    into the evaluation's folder, and what is missing for the page, if anything is."""
    page_of = functools.partial(page, report, ResultsFolder(expanded(folder)))
    return write_findings(folder, "report", report.to_dict(), tables.markdown(report), page_of, "report.html")


def load_report(folder: str | Path) -> Report:
    """What ``report.json`` holds. Raises ``EvaluationError`` where it is not there, or something else."""
    path = expanded(folder) / "report.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read: {error}. It is written when an evaluation has ended: "
            "give its command again to go on. A comparison or study has no reports."
        ) from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{path} is not the report of an evaluation: give the folder of one.")
    try:
        return Report.from_dict(values)
    except EvaluationError as error:
        raise EvaluationError(f"{path}: {error}") from error
