"""A report: every figure of an evaluation, and whether it has a headline."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmap_defense.errors import UnknownNameError
from cmap_defense.evaluation.accuracy import Accuracy
from cmap_defense.evaluation.answers import looked_at
from cmap_defense.evaluation.checks import Check, Sweep, checks_of, gradient_table, sweeps_of
from cmap_defense.evaluation.evaluation import Evaluation
from cmap_defense.evaluation.plan import CHECKS, DEFENDED, probe_of
from cmap_defense.evaluation.store import Unit
from cmap_defense.evaluation.summary import Row, Runs, WorstCase, row_of, worst_case
from cmap_defense.evaluation.tasks import CONTROL
from cmap_defense.settings import near_matches

__all__ = ["Report", "build_report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found so far.

    headline: accuracy under all attacks; None where there is none, and refused then says why, and what to do.
    rows: of the defended model and the baselines, clean images first. checks, sweeps, gradients: of the attacks.
    curves: by task of the defended model, how its purifications went: "iterations" and "accuracy", the share of right
    votes there in one purification; and the means of all others over all their iterations, by name as in
    :class:`~cmap_defense.results.History`. Empty for a model without latents.
    searches: by task of the defended model, the means over images and runs of what its attack noted at each step.
    seconds, passes: by task. missing: pieces that are not done. settings: what it was made of.
    class_names: where they are known.
    """

    headline: WorstCase | None
    refused: Sequence[str]
    rows: Sequence[Row]
    checks: Sequence[Check]
    sweeps: Sequence[Sweep]
    gradients: Sequence[Mapping[str, float]]
    curves: Mapping[str, Mapping[str, Sequence[float]]]
    searches: Mapping[str, Mapping[str, Sequence[float]]]
    seconds: Mapping[str, float]
    passes: Mapping[str, int]
    missing: int
    settings: Mapping[str, Any]
    class_names: Sequence[str] | None

    def row(self, attack: str, subject: str = DEFENDED) -> Row:
        """One row by name. Raises :class:`~cmap_defense.errors.UnknownNameError` where there is none."""
        for row in self.rows:
            if (row.subject, row.attack) == (subject, attack):
                return row
        names = [f"{row.subject}/{row.attack}" for row in self.rows]
        raise UnknownNameError(f"The report has no row {subject}/{attack}.{near_matches(f'{subject}/{attack}', names)}")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON, each accuracy with its interval."""
        return json.loads(json.dumps(_plain(self), allow_nan=False))


def build_report(evaluation: Evaluation) -> Report:
    """The report of what is there; attacks of which a piece is missing are left out, and there is no headline then."""
    missing = evaluation.missing()
    unfinished = {unit.task for unit in missing}
    units: dict[str, list[Unit]] = {}
    for unit in evaluation.units():
        units.setdefault(unit.task, []).append(unit)
    store = evaluation.store
    lines = {
        name: [line for unit in own for line in store.lines(unit)]
        for name, own in units.items()
        if name not in unfinished
    }
    gradients = lines.pop(f"{CHECKS}/gradients", [])
    runs = {name: Runs.of(own) for name, own in lines.items()}
    subject = evaluation.subjects[0]
    attacked = {run.attack: run for run in runs.values() if run.subject == DEFENDED}
    checked = {run.attack: run for run in runs.values() if run.subject == CHECKS}
    rows = [row_of(run, runs.get(f"{run.subject}/{CONTROL}")) for name, run in runs.items() if run.subject != CHECKS]
    shape = tuple(evaluation.images.images.shape[1:])
    refused = [f"{len(missing)} work units are not done yet. Give the same command again to go on."] if missing else []
    checks: list[Check] = []
    sweeps: list[Sweep] = []
    headline = None
    if not subject.attacks:
        refused.append("there was no attack. Choose some: --attacks standard.")
    elif not missing:
        checks = checks_of(subject, shape, attacked, checked, gradients)
        if checked:
            sweeps = sweeps_of(*probe_of(subject), shape, attacked, checked)
        refused += [check.reason for state in (False, None) for check in checks if check.passed is state]
        found = [attacked[name] for name in subject.attacks]
        headline = worst_case(found, attacked[CONTROL]) if not refused else None
    timings = store.timings()
    tensors = {
        name: [store.tensors(unit) for unit in own]
        for name, own in units.items()
        if name in lines and name.startswith(f"{DEFENDED}/")
    }
    curves = {
        name: _curves(found, lines[name]) for name, found in tensors.items() if lines[name][0]["on_the_way"] is not None
    }
    searches = {name: _means(found, "history.") for name, found in tensors.items()}
    return Report(
        headline=headline,
        refused=refused,
        rows=rows,
        checks=checks,
        sweeps=sweeps,
        gradients=gradient_table(gradients),
        curves=curves,
        searches={name: found for name, found in searches.items() if found},
        seconds={name: seconds for name, (seconds, _) in timings.items()},
        passes={name: passes for name, (_, passes) in timings.items()},
        missing=len(missing),
        settings=store.settings() or evaluation.settings(),
        class_names=evaluation.class_names,
    )


def _curves(tensors: Sequence[Mapping[str, Tensor]], lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """How the purifications of one task went: means over images and runs."""
    loop = _means(tensors, "loop.")
    ways = torch.tensor([line["on_the_way"] for line in lines]).double().mean(dim=0)
    iterations = looked_at(len(loop["total"])) if "total" in loop else []
    return {"iterations": [float(n) for n in iterations], "accuracy": ways.tolist(), **loop}


def _means(tensors: Sequence[Mapping[str, Tensor]], prefix: str) -> dict[str, list[float]]:
    """Means over images and runs of the tensors [steps, B] whose names begin so."""
    names = [name for name in tensors[0] if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): torch.cat([part[name] for part in tensors], dim=1).double().mean(dim=1).tolist()
        for name in names
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Accuracy):
        return {"value": value.value, "interval": list(value.interval), "correct": value.correct, "total": value.total}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
