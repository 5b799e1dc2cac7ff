"""An evaluation: work units that can be done in any order, by any number of processes, and the report of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmap_defense.attacks import PGD, Attack, ThreatModel, suite
from cmap_defense.attacks.oracle import Model, on_unit_images
from cmap_defense.attacks.suites import choose
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.classifier.cautions import warn_of_probabilities
from cmap_defense.classifier.speed import Speed, measure_speed, undefended_logits
from cmap_defense.common.describe import describe_values
from cmap_defense.common.files import locked, write_text
from cmap_defense.common.inputs import check_logits
from cmap_defense.common.modules import device_of, evaluating, using_threads
from cmap_defense.common.passes import counting_passes
from cmap_defense.common.paths import expanded
from cmap_defense.common.progress import OnProgress, Progress
from cmap_defense.common.ranks import Ranks, ranks
from cmap_defense.common.rng import isolated
from cmap_defense.common.settings import require_integer
from cmap_defense.data.selection import SelectedImages, labelled_data
from cmap_defense.data.subset import Subset
from cmap_defense.errors import CmapError, EvaluationError, MissingExtraError, SettingsError
from cmap_defense.evaluation.describe import describe_model, describe_software
from cmap_defense.evaluation.protocol import Protocol, run_indices
from cmap_defense.evaluation.report import Report, build_report, write_report
from cmap_defense.evaluation.results import ResultsFolder, Timing, WorkUnit
from cmap_defense.evaluation.summary import Runs, WorstCase, worst_case
from cmap_defense.evaluation.tasks import CHECKS, CLEAN, DEFENDED, UNDEFENDED, Batch, Task, make_tasks

Kind = TypeVar("Kind")


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is still to be done.

    Attributes:
        passes: network passes by task, of all images and runs; None where they are not known before the first work
            unit of an attack. Gradients that go back through the purification take more.
        seconds: by the work units that are finished, or else at the speed of a short purification on this machine, all
            processes together. Tasks whose passes are not known are not included.
        bytes: largest memory of that short purification; None where nothing was measured.
    """

    passes: Mapping[str, int | None]
    seconds: float
    bytes: int | None

    @property
    def total_passes(self) -> int:
        """Of all tasks whose passes are known."""
        return sum(passes or 0 for passes in self.passes.values())


class Evaluation:
    """A model, its images, its attacks and a folder for the results; ``run`` does what is not done yet.

    Making one only checks its arguments. Images are read, models run and the folder is read when a method needs it.

    Args:
        model: as ``evaluate`` takes it, like all arguments that are not listed here.
        data: images with their labels, see ``SelectedImages.of``.
        out: the folder of the results.
        undefended: whether the classifier of a purified classifier is a baseline, "undefended".

    Raises:
        SettingsError: an argument is something else.
    """

    def __init__(
        self,
        model: Model,
        data: Any,
        out: str | Path,
        *,
        attacks: str | Mapping[str, Attack] = "standard",
        threat: ThreatModel | None = None,
        protocol: Protocol | None = None,
        subset: Subset | None = None,
        baselines: Mapping[str, Model] | None = None,
        baseline_attacks: Mapping[str, Attack] | None = None,
        undefended: bool = True,
        threads: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.folder = ResultsFolder(expanded(out))
        self.protocol = require_kind("protocol", protocol, Protocol(), "Protocol(predictions=5)")
        self.subset = require_kind("subset", subset, Subset(), "Subset(count=512)")
        self._data, self._class_names = data, class_names
        self._speeds: dict[str, Speed] = {}
        self._threads = None if threads is None else require_integer("Evaluation", "threads", threads, minimum=1)
        model = on_unit_images(model)
        self._models: dict[str, Model] = {DEFENDED: model}
        if undefended and isinstance(model, PurifiedClassifier):
            self._models[UNDEFENDED] = _Undefended(model.undefended)
        for name, other in _named(baselines, "baselines", "model").items():
            if name in (DEFENDED, UNDEFENDED, CHECKS):
                raise SettingsError(f"{name!r} is the name of something else: give the baseline another.")
            self._models[name] = on_unit_images(other)
        chosen = _attacks_by_name(attacks, threat, model)
        if baseline_attacks is None:
            size = next(iter(chosen.values())).threat if chosen else threat or ThreatModel()
            baseline_attacks = {"pgd": PGD(size, steps=50, restarts=2, schedule="cosine", momentum=0.75)}
        for name, attack in _named(baseline_attacks, "baseline_attacks", "PGD(...)").items():
            if not isinstance(attack, Attack):
                raise SettingsError(
                    f"baseline_attacks[{name!r}] must be an attack such as PGD(...), but is {attack!r}."
                )
        self.attacks = {name: chosen if name == DEFENDED else baseline_attacks for name in self._models}

    # ------------------------------------------------------------------------------------------ what is to be done

    @functools.cached_property
    def images(self) -> SelectedImages:
        """The images, read and checked. Raises InputTypeError, InputValueError, DataError, SettingsError."""
        model = self._models[DEFENDED]
        channels = model.image_shape[0] if isinstance(model, PurifiedClassifier) else None
        return SelectedImages.of(labelled_data(self._data, channels), self.subset)

    @functools.cached_property
    def _recorded(self) -> dict[str, Any]:
        """The settings that the folder was begun with."""
        return self.folder.settings() or {}

    @functools.cached_property
    def models(self) -> dict[str, Model]:
        """By name: the model and its baselines, with the chunk sizes of the folder's results."""
        recorded = self._recorded.get("models", {})
        return {name: fixed_chunk(model, recorded.get(name)) for name, model in self._models.items()}

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        """By name, in the order in which they are done and shown."""
        shape = tuple(self.images.images.shape[1:])
        for attack in (attack for attacks in self.attacks.values() for attack in attacks.values()):
            attack.threat.require_fit(shape)
        return {task.name: task for task in make_tasks(self.models, self.attacks, self.protocol, shape)}

    @functools.cached_property
    def threads(self) -> int:
        """Threads of the CPU."""
        return self._threads or self._recorded.get("computation", {}).get("threads") or torch.get_num_threads()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One per class, where they are known."""
        return self.images.class_names if self._class_names is None else tuple(self._class_names)

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU for one without weights."""
        return _device(self._models[DEFENDED])

    def settings(self) -> dict[str, Any]:
        """All that decides about the results, as JSON. Each model predicts the first image once.

        Raises:
            ClassifierError: a model does not take the images, or lacks classes of the labels.
            InputValueError: the same, where it shows in the images.
        """
        chosen = self.images
        return {
            "models": {
                name: describe_model(_module(model)) | {"logits": self._first_logits[name]}
                for name, model in self.models.items()
            },
            "data": {
                "count": len(chosen),
                "classes": len(chosen.labels.unique()),
                "checksum": chosen.checksum(),
                "subset": self.subset.to_dict(),
            },
            "protocol": self.protocol.to_dict(),
            "tasks": {name: task.describe() for name, task in self.tasks.items()},
            "computation": {"threads": self.threads, **describe_software(self.device)},
        }

    def units(self) -> list[WorkUnit]:
        """All work units, in the order in which they are done and shown."""
        found = []
        for name, task in self.tasks.items():
            seeds = self.protocol.seeds[:1] if task.once else self.protocol.seeds
            groups = range(-(-self._count(task) // self.protocol.group))
            found += [WorkUnit(name, seed, group) for seed in seeds for group in groups]
        return found

    def missing(self) -> list[WorkUnit]:
        """The work units that are not done."""
        return [unit for unit in self.units() if not self.folder.done(unit)]

    def check_folder(self) -> None:
        """Raises ``EvaluationError`` where the folder's results are of other settings, each of which it names."""
        self.folder.compare(self.settings())

    def check_installed(self) -> None:
        """Raises ``MissingExtraError`` where a library that an attack needs for what is missing is not installed."""
        for name in dict.fromkeys(unit.task for unit in self.missing()):
            lacking = _lacking(self.tasks[name].attack)
            if lacking is not None:
                raise MissingExtraError(
                    f"The attack {self.tasks[name].row!r} cannot be run. {lacking} Or choose the attacks: on the "
                    "command line by --only, in Python by a dictionary."
                ) from lacking

    def expected(self) -> Expected:
        """The cost of what is missing: measured where a work unit of a task is finished, and estimated elsewhere from
        what attacks and purifiers declare and the speed of a short purification."""
        images: dict[str, int] = {}
        for unit in self.missing():
            images[unit.task] = images.get(unit.task, 0) + len(self._rows(unit))
        timings, passes = self.folder.timings(), {}
        seconds, most = 0.0, None
        for name, count in images.items():
            task, timing = self.tasks[name], timings.get(name, Timing())
            if timing.images:
                passes[name] = round(timing.passes / timing.images * count)
                seconds += timing.seconds / timing.images * count
                continue
            each = task.passes_per_image()
            passes[name] = None if each is None else each * count
            if each and isinstance(task.model, PurifiedClassifier):
                speed = self._speed(task.model_name if task.model_name in self.models else DEFENDED)
                seconds += speed.seconds * each * count
                most = max(filter(None, (most, speed.bytes)), default=None)
        return Expected(passes, seconds, most)

    # ------------------------------------------------------------------------------------------------------ doing it

    def run(self, progress: OnProgress = None) -> None:
        """Do what is missing, and write ``results.jsonl`` when all is there.

        Under torchrun the work units are dealt out to the ranks, and each of them calls this; the folder is one that
        all of them see. Killed at any moment and called again, it goes on, and ends with the same lines.

        Args:
            progress: True for a bar on standard error, or a function of (done, total): work units of this process,
                before each of them and at the end.

        Raises:
            EvaluationError: another job has the folder, or it holds results of other settings. Images that are none or
                do not fit the models raise the errors of ``images`` and ``settings``.
            MissingExtraError: a library that an attack needs is not installed.
        """
        settings = self.settings()
        self.folder.compare(settings)
        self.check_installed()
        with (
            ranks() as team,
            locked(self.folder.path, "evaluation", EvaluationError, team),
            using_threads(self.threads),
        ):
            self._agree(team, settings)
            missing = team.shared(self.missing())
            own = missing[team.rank :: team.world]
            with contextlib.ExitStack() as stack:
                shown = stack.enter_context(Progress(0, "evaluating", wanted=progress, shown=team.rank == 0))
                for model in self.models.values():
                    stack.enter_context(evaluating(_module(model)))
                for number, unit in enumerate(own):
                    shown.at(number, len(own), what=f"{unit.task}, run {unit.seed}")
                    self._do(unit, team)
                shown.at(len(own), len(own))
            team.wait()
            if team.rank == 0:
                self._merge()
            team.wait()

    def report(self) -> Report:
        """The report of what is done; tasks of which a work unit is missing are left out, and there is no headline
        then."""
        attacks, model = self.attacks[DEFENDED], self.models[DEFENDED]
        settings = self.folder.settings() or self.settings()
        shape = tuple(self.images.images.shape[1:])
        return build_report(self.folder, self.units(), settings, model, attacks, shape, self.class_names)

    def worst_case(self) -> WorstCase | None:
        """Accuracy under the worst attack on each image, without the checks that a headline needs; None where a work
        unit of the model is missing, or there are no attacks."""
        names = [DEFENDED + "/" + name for name in (CLEAN, *self.attacks[DEFENDED])]
        units = [unit for unit in self.units() if unit.task in names]
        if len(names) == 1 or not all(self.folder.done(unit) for unit in units):
            return None
        lines = {name: [line for u in units if u.task == name for line in self.folder.lines(u)] for name in names}
        clean, *attacked = map(Runs.of, lines.values())
        return worst_case(attacked, clean)

    def _do(self, unit: WorkUnit, team: Ranks) -> None:
        task, batch = self.tasks[unit.task], self._batch(unit)
        begun = time.perf_counter()
        with counting_passes() as passes:
            lines, tensors = task.run(batch)
        seconds = round(time.perf_counter() - begun, 3)
        named = {"model": task.model_name, "attack": task.row, "seed": unit.seed}
        self.folder.write(unit, [named | line for line in lines], tensors)
        self.folder.note_timing(unit, team.rank, Timing(len(lines), seconds, passes.total))

    def _merge(self) -> None:
        """All lines in one file, in the order of tasks, runs and groups."""
        lines = [json.dumps(line, allow_nan=False) for unit in self.units() for line in self.folder.lines(unit)]
        write_text(self.folder.path / "results.jsonl", "".join(line + "\n" for line in lines))

    def _count(self, task: Task) -> int:
        """How many images a task has."""
        return len(self.images) if task.limit is None else min(task.limit, len(self.images))

    def _rows(self, unit: WorkUnit) -> range:
        """The rows of a work unit's images."""
        size = self.protocol.group
        return range(unit.group * size, min((unit.group + 1) * size, self._count(self.tasks[unit.task])))

    def _batch(self, unit: WorkUnit) -> Batch:
        rows = self._rows(unit)
        chosen, where, device = self.images, slice(rows.start, rows.stop), _device(self.tasks[unit.task].model)
        positions = chosen.positions[where]
        images, labels = chosen.images[where].to(device), chosen.labels[where].to(device)
        return Batch(images, labels, positions, run_indices(positions, unit.seed))

    def _speed(self, name: str) -> Speed:
        """Of a purified classifier, measured once."""
        if name not in self._speeds:
            model = self.models[name]
            assert isinstance(model, PurifiedClassifier)
            with using_threads(self.threads), evaluating(model):
                self._speeds[name] = measure_speed(model, self.images.images[: self.protocol.group].to(_device(model)))
        return self._speeds[name]

    @functools.cached_property
    def _first_logits(self) -> dict[str, list[float]]:
        """By model, the logits of the first image without the defence: each takes it, and has the labels' classes."""
        found = {}
        for name, model in self.models.items():
            first = self.images.images[:1].to(_device(model), copy=True)  # a model may change it in place
            with torch.no_grad(), isolated(0), evaluating(_module(model)):
                outputs = undefended_logits(model, first, name)
            logits = check_logits(outputs, 1)
            if not isinstance(model, (PurifiedClassifier, _Undefended)):  # which have warned
                warn_of_probabilities(model, outputs)
            self.images.check_classes(logits.shape[1], name)
            if name == DEFENDED and self._class_names is not None:
                _check_class_names(self._class_names, logits.shape[1])
            found[name] = describe_values(logits[0])
        return found

    def _agree(self, team: Ranks, settings: dict[str, Any]) -> None:
        """The folder belongs to these settings, and all ranks to each other; all of them raise where not."""
        team.by_first(lambda: self.folder.begin(settings))
        other = None
        if team.rank != 0:
            try:
                self.folder.begin(settings, first=False)
            except CmapError as error:
                other = f"Rank {team.rank} was started with other settings than the first, or elsewhere: {error}"
        refusal = team.first_of(other)
        if refusal is not None:
            raise EvaluationError(refusal)


def evaluate(
    model: Model,
    data: Any,
    labels: Tensor | None = None,
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
    progress: OnProgress = None,
) -> Report:
    """Attack a model, re-evaluate it with independent noise, check the attacks, report.

        report = evaluate(model, load_dataset("cifar10", "test"), subset=Subset(count=512), out="runs/robustness")
        print(report.headline or report.refused)

    Errors are those of ``Evaluation`` and of its ``run``.

    Args:
        model: a ``PurifiedClassifier``, or any model, images in [0, 1] to logits. It is evaluated in eval mode.
        data: the images and their labels, see ``SelectedImages.of``; or images [N, C, H, W] alone, whose labels follow.
        labels: int64 [N], of such images.
        attacks: "standard", "paper", "exact", "full", or attacks by name.
        threat: norm and eps of a set of attacks that is given by name; None for linf, 8/255.
        protocol: how often each image is attacked and predicted; None for the defaults.
        subset: which images; None for all.
        baselines: other models by name, undefended or adversarially trained, for the same table. The classifier of a
            purified classifier is among them as "undefended".
        baseline_attacks: attacks on each of them; None for PGD with 50 steps and two restarts.
        threads: of the CPU; None for what the folder was begun with, or else for torch's.
        class_names: for the report; None for the data set's own.
        out: the folder of the results, where the same call goes on after a kill; None for none.
        progress: True for a bar on standard error, or a function of (done, total): work units.

    Returns:
        The report, which is written to the folder too: ``report.json``, ``report.md``, ``report.html``.
    """
    with ranks() as team, contextlib.ExitStack() as stack:
        folder = expanded(out) if out is not None else None
        if folder is None:
            made = stack.enter_context(tempfile.TemporaryDirectory()) if team.rank == 0 else ""
            folder = Path(team.shared(made))
        evaluation = Evaluation(
            model,
            data if labels is None else (data, labels),
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
        report = evaluation.report()
        if team.rank == 0 and out is not None:
            write_report(report, folder)
        team.wait()
        return report


class _Undefended(functools.partial[Tensor]):
    """The method ``undefended`` of a purified classifier."""

    @property
    def wrapper(self) -> PurifiedClassifier:
        return self.func.__self__  # pyright: ignore[reportFunctionMemberAccess]


def require_kind(name: str, given: Any, default: Kind, example: str) -> Kind:
    """What was given for an argument, or its default. Raises ``SettingsError`` where it is of another kind."""
    if given is None or isinstance(given, type(default)):
        return default if given is None else given
    raise SettingsError(f"{name} must be an object such as {example}, but is {given!r}.")


def _named(given: Any, option: str, example: str, otherwise: str = "") -> Mapping[str, Any]:
    """What was given by name, or nothing for None. Raises ``SettingsError`` where it is something else."""
    if given is None and not otherwise:
        return {}
    if not isinstance(given, Mapping):
        raise SettingsError(
            f"{option} must be {otherwise}a dictionary such as {{'name': {example}}}, but is {type(given).__name__}."
        )
    for name in given:
        if not isinstance(name, str):
            raise SettingsError(f"Names of {option} must be texts, but one is {name!r}.")
    return given


def _check_class_names(given: object, classes: int) -> None:
    names = tuple(given) if isinstance(given, Collection) and not isinstance(given, (str, Set)) else ()
    if len(names) != classes or not all(isinstance(name, str) for name in names):
        raise SettingsError(
            f"class_names must be a list with one name for each of the {classes} classes, but is {given!r}."
        )


def _device(model: Model) -> torch.device:
    """Where a model is; the CPU for one without weights."""
    described = model.wrapper if isinstance(model, _Undefended) else model
    parts = (described.backbone,) if isinstance(described, PurifiedClassifier) else ()
    found = [device_of(part) for part in (*parts, described)]
    return next((device for device in found if device is not None), torch.device("cpu"))


def _module(model: Model) -> object:
    """What a model is described by, and put into eval mode."""
    return model.wrapper.classifier if isinstance(model, _Undefended) else model


def fixed_chunk(model: Model, recorded: Mapping[str, Any] | None, device: torch.device | None = None) -> Model:
    """The model, on a CUDA device with a chunk size that stays, that of its recorded description where there is one:
    what fits there depends on what else is in its memory."""
    device = device or _device(model)
    if not isinstance(model, PurifiedClassifier) or model.max_parallel is not None or device.type != "cuda":
        return model
    chunk = (recorded or {}).get("max_parallel")
    with ranks() as team:
        if chunk is None:
            chunk = model.purifier.fitting(model.backbone, model.image_shape, device)
        return model.variant(hooks=True, max_parallel=team.shared(chunk))


def _attacks_by_name(
    attacks: str | Mapping[str, Attack], threat: ThreatModel | None, model: Model
) -> dict[str, Attack]:
    """Those of a set that suit the model, each once; of attacks of your own all, or an error."""
    if isinstance(attacks, str):
        chosen, left_out = choose(suite(attacks, threat or ThreatModel()), [model])
        if not chosen:
            raise SettingsError(
                f"The set of attacks {attacks!r} has none for this {type(model).__name__}: {', '.join(left_out)}. Give "
                'attacks by name, such as attacks={"pgd": PGD(ThreatModel(), steps=50)}.'
            )
        return chosen
    if threat is not None:
        raise SettingsError("threat belongs to a set of attacks by name; attacks of your own have theirs.")
    for name, attack in _named(attacks, "attacks", "PGD(...)", "the name of a set, or ").items():
        if not isinstance(attack, Attack):
            raise SettingsError(f"attacks[{name!r}] must be an attack such as PGD(...), but is {attack!r}.")
        if name == CLEAN:
            raise SettingsError(f'"{CLEAN}" is the name of the clean images: give the attack another.')
    missing = {name: attack.missing(model) for name, attack in attacks.items()}
    wrong = [f"{name} needs {what}" for name, what in missing.items() if what is not None]
    if wrong:
        described = type(model.purifier if isinstance(model, PurifiedClassifier) else model).__name__
        raise SettingsError(
            f"These attacks cannot be run on {described}: {', '.join(wrong)}. Leave them out, or take a set by its "
            'name, such as "exact", which leaves them out.'
        )
    return dict(attacks)


def _lacking(attack: Attack | None) -> MissingExtraError | None:
    """What an attack raises where a library is missing."""
    try:
        if attack is not None:
            attack.check_installed()
    except MissingExtraError as error:
        return error
    return None
