"""A report as a page: one HTML file that needs nothing else, from the report and the folder with its images.

jinja2 and matplotlib are the extra ``[report]``, imported when a page is made.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files

from cmap_defense.common.optional import optional_import
from cmap_defense.common.statistics import Accuracy
from cmap_defense.evaluation.report.report import Report
from cmap_defense.evaluation.report.samples import DIFFERENCE, samples
from cmap_defense.evaluation.report.tables import (
    HEADLINE,
    attack_name,
    model_name,
    ordered_rows,
    sections,
    strongest,
    threats,
)
from cmap_defense.evaluation.results import ResultsFolder
from cmap_defense.evaluation.tasks import CHECKS, CLEAN, DEFENDED
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
        sections=sections(report),
        plots=_plots(report),
        curves=_curves(report),
        about=[*threats(report), f"{report.settings['data']['count']} images"],
        headline=headline,
        percent=percent,
        what=HEADLINE,
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
            (f"{model_name(model)}, {attack_name(row.attack)}", str(row.reevaluated))
            for row in (rows.get(CLEAN), worst)
            if row is not None
        ]
    return found


def _plots(report: Report) -> dict[str, list[Plot]]:
    """By section."""
    found: dict[str, list[Plot]] = {}
    rows = [
        (attack_name(row.attack) if row.model == DEFENDED else f"{row.model}: {attack_name(row.attack)}", row)
        for row in ordered_rows(report)
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
            attack_name(attack): (_iterations(curve, name), curve[name])
            for attack, curve in curves.items()
            if curve.get(name) and (name != "accuracy" or curve["iterations"])
        }
        if lines:
            ends = "; ".join(f"{attack} from {y[0]:.4g} to {y[-1]:.4g}" for attack, (_, y) in lines.items())
            drawn = curve_plot(lines, label, share=name == "accuracy", prior=PRIOR.get(name))
            found.append(_plot(drawn, f"{label}, from the first to the last iteration: {ends}"))
    return found


def _iterations(curve: Mapping[str, Sequence[float]], name: str) -> Sequence[float]:
    return curve["iterations"] if name == "accuracy" else range(len(curve[name]))


def _plot(drawn: bytes, words: str) -> Plot:
    return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode("ascii"), words
