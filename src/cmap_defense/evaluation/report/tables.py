"""The sections of a report, each with its text and its table: the same for Markdown and for the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cmap_defense.certification.summary import MEANING, table
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.common.describe import description_text
from cmap_defense.common.settings import in_255ths
from cmap_defense.common.tables import Table, markdown_page, markdown_table
from cmap_defense.evaluation.report.report import Report
from cmap_defense.evaluation.results import Timing
from cmap_defense.evaluation.summary import MEASURES, Row
from cmap_defense.evaluation.tasks import CHECKS, CLEAN, DEFENDED, UNDEFENDED

HEADLINE = (
    "of the predictions are right under all attacks: the accuracy under the worst attack on each image, or the lowest "
    "re-evaluated accuracy of one attack where that is lower."
)
"""What the headline is, after its number."""

ENDING = ("re-evaluated", "spread", "one latent")

STATES = {True: "✓ passed", False: "✗ failed", None: "– not checked"}

COMPARING = (
    "Compare figures at the same number of latents K and iterations N: a vote's robustness rises with its size.",
    "Do not compare with the figures of leaderboards such as RobustBench: they leave out defences that are random, "
    "optimise or vote, since their standard attack fails on those without a sign of it.",
    "Do not compare with the figures of a surrogate in which the purification's optimisation does not occur "
    '("paper-" attacks): they are there for comparison with publications that measured so, and are no test of the '
    "defence.",
)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report: paragraphs, then a list of points, then a table, each of which may be empty."""

    id: str
    title: str
    text: Sequence[str] = ()
    table: Table = ()
    points: Sequence[str] = ()


def markdown(report: Report) -> str:
    """The text of ``report.md``."""
    parts = []
    for section in sections(report):
        parts += [f"## {section.title}", *section.text]
        if section.points:
            parts.append("\n".join(f"- {point}" for point in section.points))
        if section.table:
            parts.append(markdown_table(section.table))
    return markdown_page("Robustness report", *parts)


def sections(report: Report) -> list[Section]:
    """All sections, in their order; those without content are left out."""
    return [
        _headline(report),
        _evaluated(report),
        _accuracy(report),
        *_certified(report),
        *_chosen(report),
        _search(report),
        _checks(report),
        *_sweeps(report),
        *_gradients(report),
        _cost(report),
        _attack_settings(report),
        Section("comparing", "What may be compared with this", points=COMPARING),
    ]


def strongest(report: Report) -> list[str]:
    """Attacks on the defended model, those first after which the fewest predictions are right."""
    rows = [row for row in report.rows if row.model == DEFENDED and row.attack != CLEAN]
    return [row.attack for row in sorted(rows, key=_share)]


def threats(report: Report) -> list[str]:
    """Norm and size of the attacks on the defended model."""
    tasks = report.settings["tasks"].items()
    found = [
        task["attack"]["threat"]
        for name, task in tasks
        if name.startswith(f"{DEFENDED}/") and "threat" in (task["attack"] or {})
    ]
    return list(dict.fromkeys(f"{threat['norm']}, eps = {_size(threat['eps'])}" for threat in found))


def attack_name(attack: str) -> str:
    """As tables show it."""
    return "clean images" if attack == CLEAN else attack


def model_name(name: str) -> str:
    """As tables show it."""
    return {DEFENDED: "defended model", UNDEFENDED: "without the defence"}.get(name, name)


def ordered_rows(report: Report) -> Iterator[Row]:
    """Of the tables: clean images of the defended model, its attacks from the strongest on, then the other models."""
    own = {row.attack: row for row in report.rows if row.model == DEFENDED}
    yield from (own[name] for name in (CLEAN, *strongest(report)) if name in own)
    yield from (row for row in report.rows if row.model != DEFENDED)


def _headline(report: Report) -> Section:
    found, protocol = report.headline, report.settings["protocol"]
    if found is None:
        text = [
            "This evaluation gives no robust accuracy, for these reasons. What was measured stands below. "
            "None of it is to be quoted as the robustness of the model."
        ]
        return Section("headline", "No headline", text, points=report.refused)
    spread = "" if found.spread is None else f" Standard deviation over the runs: {found.spread:.3f}."
    if found.single is None:
        lower = "no single attack leaves less"
    else:
        name = "the clean images have" if found.single == CLEAN else f"{found.single} alone leaves"
        lower = f"{name} less, {found.accuracy}, and that is the headline"
    passed = sum(check.passed is True for check in report.checks)
    return Section(
        "headline",
        "Headline",
        [
            f"**{found.accuracy}** {HEADLINE}{spread} All {passed} checks of the attacks passed.",
            f"With the worst attack chosen for each image by {protocol['predictions']} predictions and counted by "
            f"{protocol['reevaluations']} others it is {found.by_image}; {lower}.",
            f"Counted in the usual way, as the share of images whose every vote is right, it is {found.lowest}. Of "
            f"that, without any attack, chance would leave between {found.clean.value:.3f}, the vote on clean images, "
            f"and {found.lowest_by_chance:.3f}, as many votes on them by unrelated noise.",
        ],
    )


def _evaluated(report: Report) -> Section:
    settings = report.settings
    model, protocol, data = settings["models"][DEFENDED], settings["protocol"], settings["data"]
    seeds, computation = protocol["seeds"], settings["computation"]
    subset = data["subset"]
    drawn = f"drawn at random (seed {subset['seed']})" if subset["order"] == "random" else f"the {subset['order']} ones"
    sanity = min(protocol["sanity_images"], data["count"])
    rows = [*_model(model)]
    if threats(report):
        rows.append(("Attacks within", "; ".join(threats(report))))
    return Section(
        "evaluated",
        "What was evaluated",
        table=[
            ("part", "value"),
            *rows,
            ("Images", f"{data['count']} of {data['classes']} classes, {drawn}; SHA-256 {data['checksum'][:16]}…"),
            ("Runs", f"{len(seeds)}, with seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"),
            ("Predictions", f"{protocol['predictions']} for each final image, with noise that no attack has used"),
            ("Re-evaluations", f"{protocol['reevaluations']} further ones, by which nothing is chosen"),
            ("Checks", f"on the first {sanity} images" if sanity else "none"),
            ("Computed with", ", ".join(f"{name} {computation[name]}" for name in ("torch", "numpy", "python"))),
            ("Device", f"{computation['device']}, {computation['machine']}, {computation['threads']} thread(s)"),
        ],
    )


def _model(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the defended model is made of."""
    if "backbone" not in model:
        return [("Model", _last(model["class"]))]
    backbone = model["backbone"]
    if "settings" in model:
        known = {field.name for field in dataclasses.fields(CMAPSettings)}
        loop = CMAPSettings.from_dict({name: value for name, value in model["settings"].items() if name in known})
        others = {name: value for name, value in model["settings"].items() if name not in known}
        ours = ", ".join(f"{name} {value}" for name, value in (loop.additions | others).items())
        purifier = [
            ("Latents", f"K = {loop.n_latents}"),
            ("Iterations", f"N = {loop.iterations}, learning rate {loop.learning_rate:g}"),
            ("Weights", f"w_ssim {loop.ssim_weight:g}, w_latent {loop.latent_weight:g}"),
            *([("Not the paper's", ours)] if ours else []),
        ]
    else:
        purifier = [("Purifier", description_text(model["purifier"]))]
    return [
        ("Classifier", _last(model["classifier"]["class"])),
        ("Backbone", backbone["name"] or _last(backbone["class"])),
        *purifier,
        ("Vote", f"{model['vote']}" + ("" if model["seed"] is None else f"; fixed seed {model['seed']}")),
    ]


def _accuracy(report: Report) -> Section:
    protocol = report.settings["protocol"]
    n, r, several = protocol["predictions"], protocol["reevaluations"], len(protocol["seeds"]) > 1
    rows = []
    for row in ordered_rows(report):
        spread = {name: f" ({value:.3f})" for name, value in row.spread.items()}
        cells = [f"{getattr(row, name)}{spread.get(name, '')}" for name in MEASURES]
        latent = "" if row.one_latent is None else f"{row.one_latent:.3f}"
        rows.append([model_name(row.model), attack_name(row.attack), *cells, f"{row.prediction_spread:.3f}", latent])
    if not rows:
        return Section("accuracy", "Accuracy under each attack", ["Nothing has been measured yet."])
    text = [
        "Each final image is predicted with noise that no attack has used, the same for all attacks. One-shot: the "
        f"first prediction is right. Average: the share of {n} predictions that are right. Worst of {n}: all of "
        f"them are right. Vote of {n}: the most frequent one is right. Re-evaluated: the share of {r} further "
        "predictions that are right, and their spread: the standard deviation of the accuracy of single ones. One "
        "latent: the share of single latents that are right, without the vote of the K.",
        "In square brackets: 95 % Wilson intervals on the images."
        + (" In round brackets: standard deviation over the runs." if several else ""),
    ]
    head = ["model", "attack", "one-shot", "average", f"worst of {n}", f"vote of {n}", *ENDING]
    return Section("accuracy", "Accuracy under each attack", text, [head, *rows])


def _chosen(report: Report) -> list[Section]:
    if report.headline is None:
        return []
    chosen = sorted(report.headline.chosen.items(), key=lambda item: -item[1])
    rows = [[name, f"{count:,}"] for name, count in chosen if count]
    text = ["Number of images, of all runs, on which each attack is the worst."]
    return [Section("chosen", "The worst attack on each image", text, [["attack", "images"], *rows])]


def _certified(report: Report) -> list[Section]:
    if report.certified is None:
        return []
    same = report.certified["data"]["checksum"] == report.settings["data"]["checksum"]
    text = [
        f"{MEANING} In %, in square brackets 95 % Wilson intervals, for {'the same' if same else 'other'} images.",
        "Accuracy under attacks, above, is an upper bound: of the model as it is, under the attacks that were tried. "
        "The smoothed classifier is another model, so that neither bounds the other.",
    ]
    return [Section("certified", "Certified accuracy", text, table(report.certified))]


def _search(report: Report) -> Section:
    rows = [
        [
            f"{row.model}/{row.attack}",
            str(row.search_predictions),
            str(row.search),
            "not measured" if row.search_on_clean is None else str(row.search_on_clean),
        ]
        for row in ordered_rows(report)
        if row.search is not None
    ]
    known = [
        name
        for name in strongest(report)
        if report.settings["tasks"][f"{DEFENDED}/{name}"]["attack"].get("noise") == "known"
    ]
    text = [
        "Success during a search is no success: a random defence gives a wrong prediction sooner or later. First the "
        "accuracy if any wrong prediction during the search counted; beside it the same for as many predictions of the "
        "clean images, where only chance is at work.",
        *([] if rows else ["No attack here evaluates the model as it is during its search."]),
        *(
            f"{name} knows the noise that the defence draws while it searches. So its success during the search is a "
            "success against a defence with a seed that the attacker knows; in all other tables its images are "
            "predicted with fresh noise, like those of the others."
            for name in known
        ),
    ]
    head = ["attack", "predictions", "during the search", "clean images, by chance"]
    return Section("search", "Success during the search", text, [head, *rows] if rows else ())


def _checks(report: Report) -> Section:
    rows = [[STATES[check.passed], check.name, check.found] for check in report.checks]
    counts = [sum(check.passed is state for check in report.checks) for state in STATES]
    text = (
        "An attack that does not work finds nothing, and the defence looks robust. With one check failed there is no "
        "headline. {} passed, {} failed, {} could not be checked.".format(*counts)
        if rows
        else "None were made."
    )
    head = ["result", "what must hold", "what was found"]
    return Section("checks", "Checks of the attacks", [text], [head, *rows] if rows else ())


def _sweeps(report: Report) -> list[Section]:
    found = []
    repeated = report.settings["tasks"].get(f"{CHECKS}/gradients", {}).get("attack")
    own = (name for name in strongest(report) if report.settings["tasks"][f"{DEFENDED}/{name}"]["attack"] == repeated)
    name = next(own, "An attack") if repeated else "An attack"
    for sweep in sorted(report.sweeps, key=lambda sweep: sweep.name):
        points = zip(sweep.values, sweep.accuracies, sweep.errors, strict=True)
        rows = [[f"{value:g}", f"{share:.3f} ± {error:.3f}"] for value, share, error in points]
        what = "size" if sweep.name == "eps" else "steps"
        text = (
            f"{name} at other {what}: accuracy must not rise. Means over the images of the checks in the first run, "
            "with standard errors."
        )
        title = f"Accuracy over the {what} of an attack"
        found.append(Section(sweep.name, title, [text], [[sweep.name, "accuracy"], *rows]))
    return found


def _gradients(report: Report) -> list[Section]:
    if not report.gradients:
        return []
    rows = [
        [f"{row['samples']:.0f}", f"{row['cosine']:.3f} ± {row['error']:.3f}", f"{row['variance']:.3g}"]
        for row in report.gradients
    ]
    text = [
        "The cosine of two independent averages of so many gradients each, with standard errors over images: 1 where "
        "noise is averaged away, 0 where there is only noise. The relative variance is that of the average, relative "
        "to its squared length."
    ]
    head = ["gradients averaged", "cosine", "relative variance"]
    return [Section("gradients", "What averaging does to the gradient", text, [head, *rows])]


def _cost(report: Report) -> Section:
    queries = {f"{row.model}/{row.attack}": row.queries for row in report.rows}
    rows = [
        [name, "" if queries.get(name) is None else f"{queries[name]:,}", *_timing(timing)]
        for name, timing in report.timings.items()
    ]
    text = (
        "Queries are evaluations of the model per image. Network passes and minutes are those of all images and runs, "
        f"on {report.settings['computation']['device']}."
        if rows
        else "No times were recorded."
    )
    head, total = ["task", "queries", "network passes", "minutes"], sum(report.timings.values(), Timing())
    return Section("cost", "Cost", [text], [head, *rows, ["all", "", *_timing(total)]] if rows else ())


def _attack_settings(report: Report) -> Section:
    distances = {f"{row.model}/{row.attack}": row.distance for row in report.rows}
    rows = [
        [name, description_text(task["attack"]), "" if distances.get(name) is None else f"{distances[name]:.6g}"]
        for name, task in report.settings["tasks"].items()
        if task["attack"] is not None and not name.startswith(f"{CHECKS}/")
    ]
    if not rows:
        return Section("settings", "Settings of the attacks", ["There was no attack."])
    return Section("settings", "Settings of the attacks", table=[["attack", "settings", "largest distance"], *rows])


def _timing(timing: Timing) -> list[str]:
    return [f"{timing.passes:,}", f"{timing.seconds / 60:.1f}"]


def _share(row: Row) -> float:
    return row.reevaluated.value if row.reevaluated.total else 2.0


def _size(eps: float) -> str:
    """A size, and in 255ths where it is a whole number of them."""
    steps = in_255ths(eps)
    return f"{eps:.4g} ({steps})" if steps else f"{eps:.4g}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
