"""A report: every figure of an evaluation, and whether it has a headline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from cmap_defense.attacks import Attack
from cmap_defense.attacks.oracle import Model
from cmap_defense.certification.summary import read_summary
from cmap_defense.common.files import fields_as_json
from cmap_defense.common.settings import near_matches
from cmap_defense.common.statistics import Accuracy
from cmap_defense.errors import EvaluationError, UnknownNameError
from cmap_defense.evaluation.checks import Check, Sweep, gradient_table, make_checks
from cmap_defense.evaluation.predictions import vote_iterations
from cmap_defense.evaluation.results import ResultsFolder, Timing, WorkUnit
from cmap_defense.evaluation.summary import MEASURES, Row, Runs, WorstCase, make_row, worst_case
from cmap_defense.evaluation.tasks import CHECKS, CLEAN, DEFENDED
from cmap_defense.plots.figure import printable


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What an evaluation found so far.

    Attributes:
        headline: accuracy under all attacks; None where there is none.
        refused: why there is no headline, and what to do.
        rows: of the defended model and the baselines, clean images first.
        checks: of the attacks.
        sweeps: the attack of the checks over its steps and sizes.
        gradients: by number of samples, what averaging does to the gradient.
        curves: by task of the defended model, how its purifications went: "iterations" and "accuracy", the share of
            right votes there in one purification; and the means of all others over all their iterations, by name as in
            ``History``. Empty for a model without latents.
        searches: by task of the defended model, means over images and runs of what its attack recorded at each step.
        timings: by task.
        missing: number of work units that are not done.
        settings: what the evaluation was made with.
        class_names: one per class, where they are known.
        certified: what ``cmap-defense certify`` found, which ``with_certificates`` adds; None for nothing.
    """

    headline: WorstCase | None
    refused: Sequence[str]
    rows: Sequence[Row]
    checks: Sequence[Check]
    sweeps: Sequence[Sweep]
    gradients: Sequence[Mapping[str, float]]
    curves: Mapping[str, Mapping[str, Sequence[float]]]
    searches: Mapping[str, Mapping[str, Sequence[float]]]
    timings: Mapping[str, Timing]
    missing: int
    settings: Mapping[str, Any]
    class_names: Sequence[str] | None
    certified: Mapping[str, Any] | None = None

    def with_certificates(self, folder: str | Path) -> Self:
        """The report with the certified accuracy in a folder of ``cmap-defense certify`` besides.

        Raises:
            EvaluationError: there is none.
        """
        return dataclasses.replace(self, certified=read_summary(folder))

    def row(self, attack: str, model: str = DEFENDED) -> Row:
        """One row by name. Raises ``UnknownNameError`` where there is none."""
        by_name = {f"{row.model}/{row.attack}": row for row in self.rows}
        name = f"{model}/{attack}"
        if name not in by_name:
            raise UnknownNameError(f"The report has no row {name}.{near_matches(name, by_name)}")
        return by_name[name]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON, each accuracy with its interval."""
        return fields_as_json(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what ``to_dict`` gives. Raises ``EvaluationError`` for something else."""

        def made(kind: Any, part: Mapping[str, Any], *accuracies: str) -> Any:
            found = {name: None if part[name] is None else Accuracy.from_dict(part[name]) for name in accuracies}
            return kind(**{**part, **found})

        try:
            head = values["headline"]
            parts: dict[str, Any] = {
                "headline": head and made(WorstCase, head, "accuracy", "by_image", "lowest", "clean"),
                "rows": [made(Row, row, *MEASURES, "search", "search_on_clean") for row in values["rows"]],
                "checks": [Check(**check) for check in values["checks"]],
                "sweeps": [Sweep(**sweep) for sweep in values["sweeps"]],
                "timings": {name: Timing(**timing) for name, timing in values["timings"].items()},
            }
            return cls(**{**values, **parts})
        except (KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"This is no report of this version of the package: {error!r}. Give the command of its evaluation "
                "again: what is done is not done again, and the report is written anew."
            ) from error

    def show(self) -> None:
        """Print the whole report as Markdown, as it stands in ``report.md``."""
        print(self._repr_markdown_())

    def _repr_markdown_(self) -> str:
        """The whole report, which notebooks show formatted."""
        from cmap_defense.evaluation.report.tables import markdown

        return markdown(self)

    def __repr__(self) -> str:
        """One screen: the headline or why there is none, and the accuracies."""
        head = f"headline {self.headline.accuracy}" if self.headline else "no headline"
        passed = sum(check.passed is True for check in self.checks)
        lines = [f"Report({head}; {passed} of {len(self.checks)} checks passed; {self.missing} work units missing"]
        lines += [f"  because {printable(reason, 110)}" for reason in self.refused[:6]]
        shown = sorted(self.rows, key=lambda row: row.model != DEFENDED)[:24]
        width = max((len(row.model) + len(row.attack) + 1 for row in shown), default=0)
        lines += [f"  {row.model + '/' + row.attack:<{width}}  {row.reevaluated}" for row in shown]
        if len(self.rows) > len(shown):
            lines.append(f"  and {len(self.rows) - len(shown)} more rows")
        return "\n".join(lines) + ")"


def build_report(
    folder: ResultsFolder,
    units: Sequence[WorkUnit],
    settings: Mapping[str, Any],
    model: Model,
    attacks: Mapping[str, Attack],
    image_shape: tuple[int, ...],
    class_names: Sequence[str] | None,
) -> Report:
    """The report of the work units that are done, of all ``units`` of an evaluation of a model under attacks."""
    missing = [unit for unit in units if not folder.done(unit)]
    by_task: dict[str, list[WorkUnit]] = {}
    for unit in units:
        by_task.setdefault(unit.task, []).append(unit)
    for unit in missing:
        by_task.pop(unit.task, None)
    lines = {name: [line for unit in own for line in folder.lines(unit)] for name, own in by_task.items()}
    gradients = gradient_table(lines.pop(f"{CHECKS}/gradients", []))
    runs = {name: Runs.of(own) for name, own in lines.items()}
    attacked = {run.attack: run for run in runs.values() if run.model == DEFENDED}
    checked = {run.attack: run for run in runs.values() if run.model == CHECKS}
    refused = [f"{len(missing)} work units are not done yet. Give the same command again to go on."] if missing else []
    checks: list[Check] = []
    sweeps: list[Sweep] = []
    if not attacks:
        refused.append("there was no attack. Choose some: --attacks standard.")
    elif not missing:
        checks, sweeps = make_checks(model, attacks, image_shape, attacked, checked, gradients)
        refused += [check.reason for state in (False, None) for check in checks if check.passed is state]
    found = [attacked[name] for name in attacks] if not refused else []
    tensors = {
        name: [folder.tensors(unit) for unit in own] for name, own in by_task.items() if name.startswith(f"{DEFENDED}/")
    }
    searches = {name: _means(parts, "history.") for name, parts in tensors.items()}
    return Report(
        headline=worst_case(found, attacked[CLEAN]) if found else None,
        refused=refused,
        rows=[make_row(run, runs.get(f"{run.model}/{CLEAN}")) for run in runs.values() if run.model != CHECKS],
        checks=checks,
        sweeps=sweeps,
        gradients=gradients,
        curves={
            name: _curves(parts, lines[name])
            for name, parts in tensors.items()
            if lines[name][0]["vote_right"] is not None
        },
        searches={name: recorded for name, recorded in searches.items() if recorded},
        timings=folder.timings(),
        missing=len(missing),
        settings=settings,
        class_names=class_names,
    )


def _curves(tensors: Sequence[Mapping[str, Tensor]], lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """How the purifications of one task went: means over images and runs."""
    loop = _means(tensors, "loop.")
    votes = torch.tensor([line["vote_right"] for line in lines], device="cpu").double().mean(dim=0)
    iterations = vote_iterations(len(loop["total"])) if "total" in loop else []
    return {"iterations": [float(n) for n in iterations], "accuracy": votes.tolist(), **loop}


def _means(tensors: Sequence[Mapping[str, Tensor]], prefix: str) -> dict[str, list[float]]:
    """Means over images and runs of the tensors [steps, B] whose names begin so, those that all work units have. Where
    a search of some images ended earlier, its last step stands for the rest."""
    found = {}
    for name in tensors[0]:
        if name.startswith(prefix) and all(name in part and len(part[name]) for part in tensors):
            longest = max(len(part[name]) for part in tensors)
            rows = [torch.arange(longest, device="cpu").clamp_max(len(part[name]) - 1) for part in tensors]
            whole = torch.cat([part[name][own] for part, own in zip(tensors, rows, strict=True)], dim=1)
            found[name.removeprefix(prefix)] = whole.double().mean(dim=1).tolist()
    return found
