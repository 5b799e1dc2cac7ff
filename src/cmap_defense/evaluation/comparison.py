"""Several defences of one classifier, on the same images under the same attacks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmap_defense.attacks import Attack, ThreatModel, suite
from cmap_defense.attacks.suites import choose
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.files import fields_as_json, write_findings
from cmap_defense.common.paths import expanded
from cmap_defense.common.progress import OnProgress
from cmap_defense.common.statistics import Accuracy
from cmap_defense.common.tables import markdown_page, markdown_table
from cmap_defense.data.selection import labelled_data
from cmap_defense.data.subset import Subset
from cmap_defense.errors import EvaluationError, SettingsError
from cmap_defense.evaluation.differences import WORST, Difference, differences_table, paired_differences
from cmap_defense.evaluation.evaluation import Evaluation, require_kind
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.evaluation.tasks import CLEAN, DEFENDED, is_file_name
from cmap_defense.plots.comparison import comparison_plot

FILES = ("comparison.json", "comparison.md", "comparison.svg")
LONGEST_NAME = 150
DIFFERENCES = (
    "## Differences, image by image\n\nThe accuracy of the first defence minus that of the second on the same images, "
    "with 95 % intervals, each of which holds by itself."
)
"""What the page says above the table of differences."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One defence of a comparison.

    Attributes:
        name: of the defence.
        purifier: its repr.
        n_latents: K.
        passes: largest number of network passes of an image.
        seconds: of a prediction of one image; None where it was not timed.
        clean: accuracy on clean images, re-evaluated as the others are.
        attacked: accuracy under each attack.
        worst: accuracy under the worst attack on each image.
    """

    name: str
    purifier: str
    n_latents: int
    passes: int
    seconds: float | None
    clean: Accuracy
    attacked: Mapping[str, Accuracy]
    worst: Accuracy


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Defences side by side.

    Attributes:
        rows: the defences, in the order in which they were given.
        settings: of each defence's evaluation, by name.
        left_out: attacks of the set that were made on none of the purifiers, by the reason: that not all of these have
            latents, or that the attack is the same on each of them as an earlier one. Under different attacks their
            accuracies under the worst could not be compared.
        differences: of each two defences, image by image.
    """

    rows: Sequence[Compared]
    settings: Mapping[str, Any]
    left_out: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    differences: Sequence[Difference] = ()

    def table(self) -> list[list[str]]:
        """Headings, and a row for each defence."""
        attacks = list(self.rows[0].attacked)
        found = [["defence", "K", "passes", "seconds", "clean", *attacks, WORST]]
        for row in self.rows:
            seconds = "" if row.seconds is None else f"{row.seconds:.3g}"
            shares = [row.clean, *(row.attacked[name] for name in attacks), row.worst]
            found.append([row.name, str(row.n_latents), f"{row.passes:,}", seconds, *map(str, shares)])
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON, each accuracy with its interval."""
        return fields_as_json(self)

    def _repr_markdown_(self) -> str:
        """The table, which notebooks show formatted."""
        return markdown_table(self.table())

    def __repr__(self) -> str:
        lines = [f"  {row.name}: clean {row.clean}, worst {row.worst}, {row.passes:,} passes" for row in self.rows]
        return "Comparison(\n" + "\n".join(lines) + "\n)"


def compare(
    models: Mapping[str, PurifiedClassifier],
    data: Any,
    out: str | Path,
    *,
    attacks: str | Mapping[str, Attack] = "exact",
    threat: ThreatModel | None = None,
    protocol: Protocol | None = None,
    subset: Subset | None = None,
    threads: int | None = None,
    progress: OnProgress = None,
) -> Comparison:
    """Evaluate each defence in ``out/<name>``; what is done already is not done again.

    The checks that a headline needs are left out: a comparison ranks defences under the same attacks, and ``evaluate``
    says whether the attacks on one of them worked. Compare at equal K: a vote gets more robust as it grows.

    Args:
        models: defences by name, such as ``{"one-step": model.variant(purifier=OneStep(level=0.5))}``. Names become
            folders.
        data: as ``Evaluation`` takes it.
        out: the folder.
        attacks: "exact", another set by name, of which those are made, each once, that suit all of the purifiers, or
            attacks by name, which have to suit each of them.
        threat: norm and eps of a set of attacks that is given by name.
        protocol: how often each image is attacked and predicted.
        subset: which images; None for all.
        threads: of the CPU.
        progress: True for a bar on standard error, or a function of (done, total): work units of each defence in turn.

    Returns:
        The comparison; ``write_comparison`` writes it.

    Raises:
        EvaluationError: a folder is in use, or holds results of other settings.
        SettingsError: there is no defence or no attack, or a model is no ``PurifiedClassifier``.
    """
    left_out: dict[str, list[str]] = {}
    _check_models(models)
    if isinstance(attacks, str):
        attacks, left_out = choose(suite(attacks, threat or ThreatModel()), models.values())
        threat = None
    evaluations = compared(
        models, data, out, attacks=attacks, threat=threat, protocol=protocol, subset=subset, threads=threads
    )
    rows, settings = [], {}
    for name, evaluation in evaluations.items():
        evaluation.run(progress)
        rows.append(_row(name, models[name], evaluation))
        settings[name] = evaluation.folder.settings()
    differences = paired_differences({name: evaluation.folder.path for name, evaluation in evaluations.items()})
    return Comparison(rows, settings, left_out, differences)


def _check_models(models: object) -> None:
    if not isinstance(models, Mapping) or not models:
        given = "there are none" if isinstance(models, Mapping) else f"are {type(models).__name__}"
        raise SettingsError(f'models must be defences by their names, such as {{"one-step": model}}, but {given}.')


def compared(
    models: Mapping[str, PurifiedClassifier],
    data: Any,
    out: str | Path,
    *,
    attacks: Mapping[str, Attack],
    **options: Any,
) -> dict[str, Evaluation]:
    """The evaluations that ``compare`` makes, by the name of the defence, with nothing done yet; it says what they take
    and raise."""
    _check_models(models)
    if out is None:
        raise SettingsError("A comparison is kept in a folder: give out.")
    for name, model in models.items():
        if not isinstance(name, str):
            raise SettingsError(f"models must be defences by their names, but one name is {name!r}.")
        if not isinstance(model, PurifiedClassifier):
            raise SettingsError(f"models[{name!r}] must be a PurifiedClassifier, but is a {type(model).__name__}.")
        taken = [*FILES, *(other.casefold() for other in models if other != name)]
        if not is_file_name(name) or "/" in name or len(name) > LONGEST_NAME or name.casefold() in taken:
            raise SettingsError(
                f"{name[:80]!r} cannot be the name of a folder of its own on every system: give the defence another."
            )
    variants = {name: (model, attacks) for name, model in models.items()}
    evaluations = dict(evaluations_of(variants, data, out, **options))
    if not all(evaluation.attacks[DEFENDED] for evaluation in evaluations.values()):
        raise SettingsError('A comparison needs attacks: give the name of a set, such as "exact", or attacks by name.')
    for evaluation in evaluations.values():  # before any work is done
        evaluation.check_folder()
        evaluation.check_installed()
        for task in evaluation.tasks.values():
            task.passes_per_image()
    return evaluations


def evaluations_of(
    variants: Mapping[str, tuple[PurifiedClassifier, str | Mapping[str, Attack]]],
    data: Any,
    out: str | Path,
    *,
    protocol: Protocol | None,
    **options: Any,
) -> Iterator[tuple[str, Evaluation]]:
    """Name and evaluation of each model under its attacks, in ``out/<name>``, all of the same images. The checks that a
    headline needs are left out; ``options`` are those of ``Evaluation``."""
    without = require_kind("protocol", protocol, Protocol(), "Protocol(predictions=5)")
    without = without.replace(sanity_images=0, search_on_clean=False)
    if (expanded(out) / "settings.json").exists():
        raise EvaluationError(f"{out} holds the results of one evaluation or certification. Give another folder.")
    data = labelled_data(data, next(iter(variants.values()))[0].image_shape[0])
    for name, (model, attacks) in variants.items():
        folder = expanded(out) / name
        yield name, Evaluation(model, data, folder, attacks=attacks, protocol=without, undefended=False, **options)


def left_out_lines(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Which attacks of a set are left out, for people, a line for each reason."""
    return [f"Left out, since {reason}: {', '.join(names)}." for reason, names in left_out.items()]


def write_comparison(comparison: Comparison, folder: str | Path) -> tuple[list[Path], str | None]:
    """``comparison.json``, ``comparison.md`` and, where the extra ``[report]`` is installed, ``comparison.svg``: the
    files written into the folder, and what is missing for the plot, if anything is."""
    text = (
        "Accuracy is re-evaluated with noise that no attack has used; in square brackets 95 % intervals on the images. "
        "Passes are those of one prediction of an image, at most; seconds are those of one prediction on this machine."
    )
    text = " ".join([text, *left_out_lines(comparison.left_out)])
    parts = [text, markdown_table(comparison.table())]
    if comparison.differences:
        parts += [DIFFERENCES, markdown_table(differences_table(comparison.differences))]
    page = markdown_page("Comparison of defences", *parts)
    values = comparison.to_dict()
    drawn = functools.partial(comparison_plot, values)
    return write_findings(folder, "comparison", values, page, drawn, "comparison.svg")


def _row(name: str, model: PurifiedClassifier, evaluation: Evaluation) -> Compared:
    report, worst = evaluation.report(), evaluation.worst_case()
    assert worst is not None
    timing, protocol = report.timings.get(f"{DEFENDED}/{CLEAN}"), evaluation.protocol
    predictions = 0 if timing is None else timing.images * (protocol.predictions + protocol.reevaluations)
    return Compared(
        name=name,
        purifier=repr(model.purifier),
        n_latents=model.purifier.n_latents,
        passes=model.purifier.passes,
        seconds=timing.seconds / predictions if timing is not None and predictions and timing.seconds else None,
        clean=report.row(CLEAN).reevaluated,
        attacked={attack: report.row(attack).reevaluated for attack in evaluation.attacks[DEFENDED]},
        worst=worst.accuracy,
    )
