"""A report as a page: one HTML file that needs nothing else, from its JSON and the folder with its images.

The figures are those of ``report.json``, formatted as in ``report.md``. jinja2 and matplotlib are the extra
``[report]``, imported when a page is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from cmap_defense.errors import MissingExtraError
from cmap_defense.evaluation.plan import CHECKS, DEFENDED, UNDEFENDED
from cmap_defense.evaluation.report import plots, samples
from cmap_defense.evaluation.report.markdown import COMPARING, HEADLINE, accuracy, headline_members, purifier_text
from cmap_defense.evaluation.store import Store
from cmap_defense.evaluation.summary import MEASURES
from cmap_defense.evaluation.tasks import CONTROL

__all__ = ["page"]

Facts = Mapping[str, Any]

FOLLOWED = 3
"""So many attacks, the strongest, are drawn over the iterations of the purification."""

SAMPLED = 2
"""So many attacks, the strongest, have their images shown."""

STATES = {True: ("passed", "✓"), False: ("failed", "✗"), None: ("not seen", "–")}
"""Words and signs of checks."""

COURSES = {
    "total": ("loss", "L, the whole loss (eq. 9)"),
    "l1": ("loss", "L1 distance to the input (eq. 10)"),
    "ssim": ("loss", "SSIM with the input (eq. 10), higher is closer"),
    "latent": ("loss", "L_d, latents from their prior (eq. 12)"),
    "latent_mean": ("moments", "mean of the latents' elements"),
    "latent_std": ("moments", "standard deviation of the latents' elements"),
}
"""What is drawn over the iterations of the purification: where, and under which name."""

PRIOR = {"latent_mean": 0.0, "latent_std": 1.0}

SWEEPS = {"eps": "Over the size of the attack", "steps": "Over the steps of the attack"}


def page(facts: Facts, store: Store) -> str:
    """The text of ``report.html``; the same for the same facts and images.

    Args:
        facts: what :meth:`Report.to_dict` gives.
        store: the folder of the evaluation; where its images are gone, the page is without them.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        EvaluationError: the images cannot be read.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise MissingExtraError(
            f"The page of a report is made with jinja2, which cannot be imported ({error}): "
            "pip install 'cmap-defense[report]'."
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["accuracy"] = accuracy
    environment.filters["drawn"] = markupsafe.Markup  # of plots alone, which escape what they are given
    template = files(plots.__package__ or "").joinpath("template.html.j2").read_text(encoding="utf-8")
    strongest = _strongest(facts)
    return environment.from_string(template).render(
        facts=facts,
        settings=facts["settings"],
        protocol=facts["settings"]["protocol"],
        several=len(facts["settings"]["protocol"]["seeds"]) > 1,
        headline=_headline(facts),
        model=_model(facts),
        threats=_threats(facts),
        forest=_forest(facts, strongest),
        groups=_groups(facts, strongest),
        measures=MEASURES,
        has_latents=any(row["one_latent"] is not None for row in facts["rows"]),
        checks=[{**check, "state": STATES[check["passed"]]} for check in facts["checks"]],
        sweeps=_sweeps(facts),
        probe=_probe(facts)[0],
        averaging=_averaging(facts),
        courses=_courses(facts, strongest),
        keys=[plots.key(number) for number in range(1 + FOLLOWED)],
        samples=samples.samples(facts, store, strongest[:SAMPLED]),
        difference=samples.DIFFERENCE,
        costs=_costs(facts),
        attacks=_attacks(facts),
        comparing=_comparing(),
    )


def _strongest(facts: Facts) -> list[str]:
    """Attacks on the defended model, those first after which the fewest answers are right."""
    rows = [row for row in facts["rows"] if row["subject"] == DEFENDED and row["attack"] != CONTROL]
    return [row["attack"] for row in sorted(rows, key=_share)]


def _share(row: Facts) -> float:
    value = row["repurified"]["value"]
    return 2.0 if value is None else value


def _row(facts: Facts, subject: str, attack: str) -> Facts | None:
    rows = (row for row in facts["rows"] if (row["subject"], row["attack"]) == (subject, attack))
    return next(rows, None)


def _headline(facts: Facts) -> dict[str, Any] | None:
    """What stands at the top, where there is a headline; beside it clean images and the other models."""
    found = facts["headline"]
    if found is None:
        return None
    beside = []
    for subject in dict.fromkeys(row["subject"] for row in facts["rows"]):
        clean = _row(facts, subject, CONTROL)
        if clean is not None:
            beside.append((_subject(subject), "clean images", clean["repurified"]))
        others = [row for row in facts["rows"] if row["subject"] == subject and row["attack"] != CONTROL]
        if subject != DEFENDED and others:
            worst = min(others, key=_share)
            beside.append((_subject(subject), f"under {worst['attack']}", worst["repurified"]))
        elif subject == DEFENDED:
            beside.append((_subject(subject), "all attacks", found["accuracy"]))
    value = found["accuracy"]["value"]
    chosen = sorted(found["chosen"].items(), key=lambda item: -item[1])
    return {
        **found,
        "percent": f"{100 * float(f'{value:.3f}'):.1f}",  # of what the tables show, so that both are rounded alike
        "what": HEADLINE,
        "members": headline_members(facts),
        "beside": beside,
        "chosen": [(name, count) for name, count in chosen if count],
        "total": sum(found["chosen"].values()),
    }


def _subject(name: str) -> str:
    return {DEFENDED: "Defended model", UNDEFENDED: "Without the defence"}.get(name, name)


def _model(facts: Facts) -> list[tuple[str, str]]:
    """Names and values of what the defended model is made of."""
    model = facts["settings"]["models"][DEFENDED]
    if "backbone" not in model:
        return [("Model", _last(model["class"]))]
    backbone = model["backbone"]
    if "settings" in model:
        loop = model["settings"]
        purifier = [
            ("Latents", f"K = {loop['n_latents']}"),
            ("Iterations", f"N = {loop['iterations']}, learning rate {loop['learning_rate']:g}"),
            ("Weights", f"w_ssim {loop['ssim_weight']:g}, w_latent {loop['latent_weight']:g}"),
        ]
    else:
        purifier = [("Purifier", purifier_text(model["purifier"]))]
    return [
        ("Classifier", _last(model["classifier"]["class"])),
        ("Backbone", backbone["name"] or _last(backbone["class"])),
        *purifier,
        ("Vote", f"{model['vote']}" + ("" if model["seed"] is None else f"; fixed seed {model['seed']}")),
    ]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _threats(facts: Facts) -> list[str]:
    """Norm and size of the attacks on the defended model."""
    tasks = facts["settings"]["tasks"].items()
    found = [_threat(task["attack"]) for name, task in tasks if name.startswith(f"{DEFENDED}/")]
    return list(dict.fromkeys(f"{norm}, eps = {_size(eps)}" for norm, eps in filter(None, found)))


def _threat(attack: str | None) -> tuple[str, float] | None:
    found = re.search(r"ThreatModel\(norm='(\w+)', eps=([-+.\de]+)\)", attack or "")
    return None if found is None else (found[1], float(found[2]))


def _size(eps: float) -> str:
    """A size, and in 255ths where it is a whole number of them."""
    steps = round(eps * 255)
    return f"{eps:.4g} ({steps}/255)" if abs(eps * 255 - steps) < 1e-6 and 0 < steps < 255 else f"{eps:.4g}"


def _groups(facts: Facts, strongest: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the tables: attacks from the strongest on, clean images, then the other models."""
    others = dict.fromkeys(row["subject"] for row in facts["rows"] if row["subject"] != DEFENDED)
    found = [
        ("Defended model, attacked", [_row(facts, DEFENDED, attack) for attack in strongest]),
        ("Defended model, not attacked", [_row(facts, DEFENDED, CONTROL)]),
        *((_subject(name), [row for row in facts["rows"] if row["subject"] == name]) for name in others),
    ]
    kept = [{"title": title, "rows": [row for row in rows if row is not None]} for title, rows in found]
    return [group for group in kept if group["rows"]]


def _forest(facts: Facts, strongest: Sequence[str]) -> list[str]:
    """The plot of all accuracies, wide and narrow; none without rows."""
    groups = [
        plots.Bars(
            group["title"], [plots.Bar(_attack(row["attack"]), row["repurified"], row["vote"]) for row in group["rows"]]
        )
        for group in _groups(facts, strongest)
    ]
    if not groups:
        return []
    if facts["headline"] is not None:
        worst = plots.Bar("all attacks", facts["headline"]["accuracy"], None, "D")
        groups.insert(0, plots.Bars("Headline", [worst]))
    shown = [f"{group.title}: {bar.name} {accuracy(bar.answers)}" for group in groups for bar in group.bars]
    about = "Accuracy of re-purified answers with 95 % intervals. " + "; ".join(shown)
    votes, title = facts["settings"]["protocol"]["answers"], "Accuracy by attack"
    return [plots.accuracies(groups, votes, narrow=narrow, title=title, description=about) for narrow in (False, True)]


def _attack(name: str) -> str:
    return "clean images" if name == CONTROL else name


def _probe(facts: Facts) -> tuple[str | None, str]:
    """The attack that the checks were made with: its name among those on the defended model, and its settings."""
    tasks = facts["settings"]["tasks"]
    how = tasks.get(f"{CHECKS}/gradients", {}).get("attack") or ""
    own = {f"{DEFENDED}/{name}": name for name in _strongest(facts)}
    return next((name for task, name in own.items() if how and tasks[task]["attack"] == how), None), how


def _sweeps(facts: Facts) -> list[dict[str, Any]]:
    """Each sweep with its plot, in which the probe's own size and steps are marked."""
    tasks, (_, probe) = facts["settings"]["tasks"], _probe(facts)
    threat, steps = _threat(probe), re.search(r"\bsteps=(\d+)", probe)
    own = {"eps": threat and threat[1], "steps": steps and float(steps[1])}
    found = []
    for sweep in sorted(facts["sweeps"], key=lambda sweep: sweep["name"]):
        sizes = sweep["name"] == "eps"
        any_image = sizes and f"{CHECKS}/eps-any" in tasks
        points = list(zip(sweep["values"], sweep["accuracies"], sweep["errors"], strict=True))
        axis = f"eps ({threat[0]})" if sizes and threat else sweep["name"]
        about = "; ".join(f"{value:g}: {share:.3f} ± {error:.3f}" for value, share, error in points)
        title = SWEEPS.get(sweep["name"], f"Over {sweep['name']}")
        plot = plots.sweep(
            sweep, any_image=any_image, own=own.get(sweep["name"]), axis=axis, title=title, description=about
        )
        found.append({"name": sweep["name"], "title": title, "plot": plot, "points": points, "any_image": any_image})
    return found


def _averaging(facts: Facts) -> str | None:
    table = facts["gradients"]
    if not table:
        return None
    about = "; ".join(f"{row['samples']:.0f}: {row['cosine']:.3f} ± {row['error']:.3f}" for row in table)
    return plots.averaging(table, title="Cosine of two averages of gradients", description=about)


def _courses(facts: Facts, strongest: Sequence[str]) -> dict[str, Any] | None:
    """Plots over the iterations, by section; None where there are no curves."""
    followed = [CONTROL, *strongest][: 1 + FOLLOWED]
    curves = {
        attack: facts["curves"][f"{DEFENDED}/{attack}"]
        for attack in followed
        if f"{DEFENDED}/{attack}" in facts["curves"]
    }
    if not curves:
        return None
    found: dict[str, list[str]] = {"accuracy": [], "loss": [], "moments": []}
    lines = {
        attack: (curve["iterations"], curve["accuracy"]) for attack, curve in curves.items() if curve["iterations"]
    }
    if lines:
        found["accuracy"].append(_course(lines, "accuracy", "accuracy of the vote", share=True))
    for name, (section, axis) in COURSES.items():
        lines = {attack: (range(len(curve[name])), curve[name]) for attack, curve in curves.items() if curve.get(name)}
        if lines:
            found[section].append(_course(lines, name, axis, prior=PRIOR.get(name)))
    return {"names": [_attack(attack) for attack in curves], **found}


def _course(lines: Mapping[str, Any], name: str, axis: str, **how: Any) -> str:
    drawn = [plots.Line(list(x), y, number) for number, (x, y) in enumerate(lines.values())]
    ends = [f"{_attack(attack)} from {y[0]:.4g} to {y[-1]:.4g}" for attack, (_, y) in lines.items()]
    about = "From the first to the last iteration: " + "; ".join(ends)
    return plots.course(drawn, name, axis, title=f"{axis} over the iterations", description=about, **how)


def _costs(facts: Facts) -> list[dict[str, Any]]:
    """Tasks with queries, passes and seconds."""
    queries = {f"{row['subject']}/{row['attack']}": row["queries"] for row in facts["rows"]}
    return [
        {"name": name, "queries": queries.get(name), "passes": facts["passes"].get(name, 0), "seconds": seconds}
        for name, seconds in facts["seconds"].items()
    ]


def _attacks(facts: Facts) -> list[dict[str, Any]]:
    """Attacks, by the name of their task, with their settings and how far they went."""
    rows = {f"{row['subject']}/{row['attack']}": row for row in facts["rows"]}
    return [
        {"name": name, "settings": task["attack"], "distance": rows[name]["distance"] if name in rows else None}
        for name, task in facts["settings"]["tasks"].items()
        if task["attack"] is not None and not name.startswith(f"{CHECKS}/")
    ]


def _comparing() -> dict[str, Any]:
    """The part of the Markdown's text, as a title and its points."""
    title, _, rest = COMPARING.partition("\n\n")
    return {
        "title": title.lstrip("# "),
        "points": [" ".join(point.split()) for point in rest.removeprefix("- ").split("\n- ")],
    }
