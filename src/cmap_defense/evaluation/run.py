"""One call: how robust is this model, really?"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmap_defense.attacks import Attack, ThreatModel
from cmap_defense.attacks.oracle import Model
from cmap_defense.evaluation.evaluation import Evaluation, Progress
from cmap_defense.evaluation.protocol import Protocol, Subset
from cmap_defense.evaluation.report import Report, build_report
from cmap_defense.evaluation.report.files import write_report
from cmap_defense.ranks import ranks

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    data: Any,
    *,
    attacks: str | Mapping[str, Attack] = "standard",
    threat: ThreatModel | None = None,
    protocol: Protocol | None = None,
    subset: Subset | None = None,
    baselines: Mapping[str, Model] | None = None,
    baseline_attacks: Mapping[str, Attack] | None = None,
    threads: int | None = None,
    class_names: Sequence[str] | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Attack a model in every way named, judge it afresh, check the attacks, report.

    ::

        report = evaluate(model, load_dataset("cifar10", "test"), subset=Subset(count=512), out="runs/robustness")
        print(report.headline or report.refused)

    Args:
        model, data, attacks, threat, protocol, subset, baselines, baseline_attacks, threads, class_names: see
            :class:`~cmap_defense.evaluation.evaluation.Evaluation`.
        out: the folder of the results; the same call goes on there after a kill. None for none: only the report is
            left.
        progress: called before each piece of work.

    Returns:
        The report, which is written to the folder too: ``report.json``, ``report.md``, ``report.html``.

    Raises:
        EvaluationError: another job has the folder, or it holds results of other settings.
        SettingsError, InputTypeError, InputValueError, DataError: an argument is out of its range.
    """
    with ranks() as team, contextlib.ExitStack() as stack:
        folder = Path(out) if out is not None else None
        if folder is None:
            made = stack.enter_context(tempfile.TemporaryDirectory()) if team.rank == 0 else ""
            folder = Path(team.shared(made))
        evaluation = Evaluation(
            model,
            data,
            folder,
            attacks=attacks,
            threat=threat,
            protocol=protocol,
            subset=subset,
            baselines=baselines,
            baseline_attacks=baseline_attacks,
            threads=threads,
            class_names=class_names,
        )
        evaluation.run(progress)
        report = build_report(evaluation)
        if team.rank == 0 and out is not None:
            write_report(report.to_dict(), folder)
        team.wait()
        return report
