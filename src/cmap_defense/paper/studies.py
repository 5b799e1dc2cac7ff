"""The studies of arXiv 2412.08394: one thing is varied, the rest stays, and a table and a plot come out.

Each variant is an evaluation of its own in a folder of its own, without the checks: a study compares, and has no
headline.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmap_defense.attacks import PGD, Attack, ConsistencyDisruption, NoiseAndDenoise, ThreatModel, Transfer
from cmap_defense.attacks.consistency_disruption import RELEASED_BETA
from cmap_defense.backbones.karras import karras_levels
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.files import write_findings
from cmap_defense.common.progress import OnProgress
from cmap_defense.common.settings import near_matches
from cmap_defense.common.statistics import Accuracy
from cmap_defense.common.tables import markdown_page, markdown_table
from cmap_defense.data.subset import Subset
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation.comparison import evaluations_of
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.evaluation.tasks import DEFENDED
from cmap_defense.plots.studies import study_plot


@dataclasses.dataclass(frozen=True)
class Variant:
    """One evaluation of a study: the name of its folder, the value of what is varied where it is a number, changes to
    the CMAP settings, and attacks by name."""

    name: str
    value: float | None
    changes: Mapping[str, Any]
    attacks: Mapping[str, Attack]


@dataclasses.dataclass(frozen=True)
class Study:
    """What is varied: the name as in ``STUDIES``, what it shows and where the paper does, what the axis is called, and
    the variants in their order."""

    name: str
    title: str
    axis: str
    variants: Sequence[Variant]


Maker = Callable[[PurifiedClassifier, Mapping[str, Attack], ThreatModel], Study]


def _vote(model: PurifiedClassifier, attacks: Mapping[str, Attack], threat: ThreatModel) -> Study:
    title = "With the vote of the K latents and without it (Tab. XI): the columns 'one prediction' and 'one latent'"
    return Study("vote", title, "vote", [Variant("as-it-is", None, {}, attacks)])


def _setting(setting: str, values: Sequence[float], axis: str, title: str) -> Maker:
    """A study over one of the CMAP settings."""

    def make(model: PurifiedClassifier, attacks: Mapping[str, Attack], threat: ThreatModel) -> Study:
        variants = [Variant(f"{value:g}", float(value), {setting: value}, attacks) for value in values]
        return Study(setting.removeprefix("n_").replace("_", "-"), title, axis, variants)

    return make


def _beta(model: PurifiedClassifier, _: Mapping[str, Attack], threat: ThreatModel) -> Study:
    """The released beta and others, over powers of ten: the worst of them counts."""
    most = RELEASED_BETA[threat.norm]
    values = [most * factor for factor in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
    steps, name = 5 * model.settings.iterations, "consistency-disruption"
    made = {beta: {name: ConsistencyDisruption(threat, steps=steps, beta=beta)} for beta in values}
    variants = [Variant(f"{beta:g}", beta, {}, attacks) for beta, attacks in made.items()]
    return Study("beta", "Weight of the cross-entropy in the consistency-disruption attack (Tab. X)", "beta", variants)


def _surrogate(model: PurifiedClassifier, attacks: Mapping[str, Attack], threat: ThreatModel) -> Study:
    """The lower half of the schedule that the release takes level 5 of."""
    variants = []
    for level, sigma in enumerate(karras_levels(18)[:9], start=1):
        source = NoiseAndDenoise(sigma=sigma)
        attack = Transfer(PGD(threat, steps=20, eot=4, momentum=0.75, schedule="cosine"), source=source)
        variants.append(Variant(f"level-{level}", sigma, {}, {"surrogate": attack}))
    return Study("surrogate", "Noise level of the surrogate that is attacked (Tab. V)", "sigma", variants)


def _eps(model: PurifiedClassifier, attacks: Mapping[str, Attack], threat: ThreatModel) -> Study:
    variants = []
    largest = threat.largest_eps(model.image_shape)
    for factor in (1, 1.5, 2, 3, 4):
        if factor > 1 and factor * threat.eps > largest:
            break
        size = threat.replace(eps=factor * threat.eps)
        moved = {name: attack.under(size) for name, attack in attacks.items()}
        variants.append(Variant(f"{factor:g}x", size.eps, {}, moved))
    return Study("eps", "Higher intensities of the attack (Tab. VI)", "eps", variants)


def _trajectory(model: PurifiedClassifier, attacks: Mapping[str, Attack], threat: ThreatModel) -> Study:
    """Accuracy and latent moments along the attack, and along the purification of what it found."""
    disruption = ConsistencyDisruption(threat, steps=5 * model.settings.iterations, beta=100.0)
    title = "Along the consistency-disruption attack and the purification after it (Fig. 4 and 5)"
    variants = [Variant("as-it-is", None, {}, {"consistency-disruption": disruption})]
    return Study("trajectory", title, "step", variants)


STUDIES: Mapping[str, Maker] = {
    "vote": _vote,
    "ssim-weight": _setting("ssim_weight", (0, 0.5, 1, 2, 4, 8), "w_ssim", "Weight of SSIM in eq. 10 (Tab. VII)"),
    "latent-weight": _setting(
        "latent_weight", (0, 1, 3.2, 10, 32), "w_latent", "Weight of the latent moments, eq. 12 (Tab. VIII, Fig. 3)"
    ),
    "latents": _setting("n_latents", (1, 2, 5, 10), "K", "Number of latents (Tab. IX)"),
    "beta": _beta,
    "surrogate": _surrogate,
    "eps": _eps,
    "trajectory": _trajectory,
}
"""The studies by name."""


def make_study(name: str, model: PurifiedClassifier, attacks: Mapping[str, Attack], threat: ThreatModel) -> Study:
    """One of ``STUDIES``.

    Args:
        name: as there.
        model: what is studied.
        attacks: by name; "beta", "surrogate" and "trajectory" have their own.
        threat: norm and eps of its own attacks.

    Raises:
        SettingsError: there is no such study.
    """
    if name not in STUDIES:
        raise SettingsError(f"There is no study {name!r}.{near_matches(name, set(STUDIES))}")
    return STUDIES[name](model, attacks, threat)


def run_study(
    study: Study,
    model: PurifiedClassifier,
    data: Any,
    out: Path,
    *,
    protocol: Protocol | None = None,
    subset: Subset | None = None,
    threads: int | None = None,
    progress: OnProgress = None,
) -> dict[str, Any]:
    """Evaluate each variant in ``out/<variant>``; what is done already is not done again.

    Args:
        study: what is varied.
        model: what is studied.
        data: as ``Evaluation`` takes it.
        out: the folder.
        protocol: how often each image is attacked and predicted; its checks are left out.
        subset: which images; None for all.
        threads: of the CPU.
        progress: True for a bar on standard error, or a function of (done, total): work units of each variant in turn.

    Returns:
        Everything as JSON: "rows" with "variant", "value", "attack" and the row of the report; and by variant the
        course of purifications and searches, and the settings.

    Raises:
        EvaluationError: a folder is in use, or holds results of other settings.
    """
    variants = {}
    for variant in study.variants:
        settings = model.settings.replace(**variant.changes)
        changed = model.variant(hooks=True, settings=settings) if variant.changes else model
        variants[variant.name] = changed, variant.attacks
    whole = {}
    for name, evaluation in evaluations_of(variants, data, out, protocol=protocol, subset=subset, threads=threads):
        evaluation.run(progress)
        whole[name] = evaluation.report().to_dict()
    rows = [
        {"variant": variant.name, "value": variant.value, "attack": row["attack"], "row": row}
        for variant in study.variants
        for row in whole[variant.name]["rows"]
        if row["model"] == DEFENDED
    ]
    parts = {part: {name: found[part] for name, found in whole.items()} for part in ("curves", "searches", "settings")}
    return {"name": study.name, "title": study.title, "axis": study.axis, "rows": rows, **parts}


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
    first = next(iter(study["settings"].values()))
    protocol, loop = first["protocol"], first["models"]["defended"]["settings"]
    text = (
        f"{first['data']['count']} images, K = {loop['n_latents']}, N = {loop['iterations']} where not varied. "
        f"One prediction: the mean of {protocol['predictions']}. Vote: theirs. Re-evaluated: the mean of "
        f"{protocol['reevaluations']} others. In square brackets: 95 % Wilson intervals on the images."
    )
    return markdown_page(study["title"], text, markdown_table(study_rows(study)))


def write_study(study: Mapping[str, Any], folder: str | Path) -> tuple[list[Path], str | None]:
    """``study.json``, ``study.md`` and, where the extra ``[report]`` is installed, ``study.svg``: the files, and what
    is missing for the plot, if anything is."""
    drawn = functools.partial(study_plot, study)
    return write_findings(folder, "study", study, study_markdown(study), drawn, "study.svg")
