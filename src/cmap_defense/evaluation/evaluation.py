"""An evaluation: what is to be done, in pieces that can be done in any order, by any number of processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cmap_defense.attacks import PGD, Attack, ThreatModel, full_suite, paper_suite, standard_suite
from cmap_defense.attacks.oracle import Model
from cmap_defense.cautions import warn_of_probabilities
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cmap.memory import default_max_parallel
from cmap_defense.errors import CmapError, EvaluationError, SettingsError
from cmap_defense.evaluation.cost import AttackCost, counted_passes, probe, rehearse
from cmap_defense.evaluation.describe import checksum, describe_answer, describe_model, describe_software
from cmap_defense.evaluation.images import EvaluationImages, data_for, first_outputs
from cmap_defense.evaluation.plan import DEFENDED, UNDEFENDED, Subject, tasks_of
from cmap_defense.evaluation.protocol import Protocol, Subset, run_indices
from cmap_defense.evaluation.store import Store, Unit, write_text
from cmap_defense.evaluation.tasks import AttackTask, ControlTask, GradientTask, Group, Task
from cmap_defense.inputs import check_logits
from cmap_defense.modules import device_of, evaluating
from cmap_defense.ranks import Ranks, ranks
from cmap_defense.rng import isolated
from cmap_defense.settings import near_matches, require_integer

__all__ = ["SUITES", "Evaluation", "Expected", "Progress"]

SUITES: Mapping[str, Callable[[ThreatModel], dict[str, Attack]]] = {
    "standard": standard_suite,
    "paper": paper_suite,
    "full": full_suite,
}
"""Sets of attacks by name, at their own sizes."""

Progress = Callable[[Unit, int, int], None]
"""Called before each piece of this process: the piece, how many of its own are done, how many it has."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is still to be done.

    passes: latents through the backbone, by task, all images and runs; None where an attack could not be counted.
    seconds: at the speed of a short piece on this machine, all processes together; the classifier's own work and the
    second derivatives of unrolled gradients come on top. bytes: the most memory so far, in a short piece.
    """

    passes: Mapping[str, int | None]
    seconds: float
    bytes: int | None

    @property
    def total_passes(self) -> int:
        """Of all tasks that could be counted."""
        return sum(passes or 0 for passes in self.passes.values())


class Evaluation:
    """A model, its images, its attacks and a folder for the results; :meth:`run` does what is not done yet.

    Args:
        model: a :class:`~cmap_defense.classifier.PurifiedClassifier`, or any model, images in [0, 1] to logits. It is
            evaluated in eval mode.
        data: see :meth:`EvaluationImages.of <cmap_defense.evaluation.images.EvaluationImages.of>`.
        out: the folder.
        attacks: "standard", "paper", "full", or attacks by name.
        threat: of the sets that have a name; None for linf, 8/255.
        protocol: how often each image is attacked and asked about.
        subset: which images; None for all.
        baselines: models by name, undefended or adversarially trained, for the same table. The classifier of a purified
            classifier is among them as "undefended", unless ``undefended`` is False.
        baseline_attacks: on each of them; None for PGD with 50 steps and two restarts.
        threads: of the CPU; None for what the folder was begun with, or else for torch's.
        class_names: for the report; None for the data set's own.

    Raises:
        SettingsError, InputTypeError, InputValueError, DataError: these are something else.
        EvaluationError: ``out`` is something else.
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
        self.store = Store(Path(out))
        self.protocol = protocol or Protocol()
        self.subset = subset or Subset()
        self.images = EvaluationImages.of(data_for(model, data), self.subset)
        self.class_names = self.images.class_names if class_names is None else tuple(class_names)
        before = self.store.settings() or {}
        recorded = before.get("models", {})
        self.model = fixed_chunk(_in_unit(model), recorded.get(DEFENDED))
        chosen = _attacks(attacks, threat)
        if baseline_attacks is None:
            size = next(iter(chosen.values())).threat if chosen else threat or ThreatModel()
            baseline_attacks = {"pgd": PGD(size, steps=50, restarts=2, schedule="cosine", momentum=0.75)}
        others = dict(baselines or {})
        for name in others:
            if name in (DEFENDED, UNDEFENDED, "checks"):
                raise SettingsError(f"{name!r} is the name of something else: give the baseline another.")
        if undefended and isinstance(self.model, PurifiedClassifier):
            others = {UNDEFENDED: _Undefended(self.model.undefended), **others}
        self.subjects = [Subject(DEFENDED, self.model, chosen)]
        self.subjects += [
            Subject(name, fixed_chunk(_in_unit(other), recorded.get(name)), baseline_attacks)
            for name, other in others.items()
        ]
        image_shape = tuple(self.images.images.shape[1:])
        for attack in (attack for subject in self.subjects for attack in subject.attacks.values()):
            attack.threat.require_fit(image_shape)
        self.tasks = tasks_of(self.subjects, self.protocol, image_shape)
        if threads is not None:
            threads = require_integer("Evaluation", "threads", threads, minimum=1)
        self.threads = threads or before.get("computation", {}).get("threads") or torch.get_num_threads()
        self._answers = {subject.name: self._first_answer(subject) for subject in self.subjects}

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU for one without weights."""
        return _device(self.model)

    def settings(self) -> dict[str, Any]:
        """All that decides about the results, as JSON."""
        chosen = self.images
        content = [("images", chosen.images), ("labels", chosen.labels), ("positions", chosen.positions)]
        return {
            "models": {
                subject.name: describe_model(_described(subject.model)) | {"answer": self._answers[subject.name]}
                for subject in self.subjects
            },
            "data": {
                "count": len(chosen),
                "classes": len(chosen.labels.unique()),
                "checksum": checksum(content),
                "subset": self.subset.to_dict(),
            },
            "protocol": self.protocol.to_dict(),
            "tasks": {task.name: task.describe() for task in self.tasks},
            "computation": {"threads": self.threads, **describe_software(self.device)},
        }

    def units(self) -> list[Unit]:
        """All pieces, in the order in which they are done and shown."""
        found = []
        for task in self.tasks:
            seeds = self.protocol.seeds[:1] if task.once else self.protocol.seeds
            count = len(self.images) if task.limit is None else min(task.limit, len(self.images))
            groups = range(-(-count // self.protocol.group))
            found += [Unit(task.name, seed, group) for seed in seeds for group in groups]
        return found

    def missing(self) -> list[Unit]:
        """The pieces that are not done."""
        return [unit for unit in self.units() if not self.store.done(unit)]

    def check_folder(self) -> None:
        """See whether the results in the folder, if there are some, are of these settings. Nothing is written.

        Raises:
            EvaluationError: they are of other settings; the message has a line for each that differs.
        """
        self.store.compare(self.settings())

    def expected(self) -> Expected:
        """The cost of what is missing. It runs each attack once on a stand-in, and a few iterations of the model."""
        tasks = {task.name: task for task in self.tasks}
        images: dict[str, int] = {}
        for unit in self.missing():
            images[unit.task] = images.get(unit.task, 0) + len(self._positions(tasks[unit.task], unit.group))
        passes: dict[str, int | None] = {}
        seconds, most = 0.0, None
        with self._threads():
            for subject in self.subjects:
                model = subject.model
                own = [name for name in images if tasks[name].model is model]
                with evaluating(_described(model)):
                    costs = {name: self._passes(tasks[name]) for name in own}
                    found = {name: None if cost is None else cost * images[name] for name, cost in costs.items()}
                    if isinstance(model, PurifiedClassifier) and own:
                        seen = probe(model, self.images.images[: self.protocol.group].to(_device(model)))
                        seconds += seen.seconds * sum(count or 0 for count in found.values())
                        most = max(filter(None, (most, seen.bytes)), default=None)
                passes |= found
        return Expected({name: passes[name] for name in images}, seconds, most)

    def run(self, progress: Progress | None = None) -> None:
        """Do what is missing, and write ``results.jsonl`` when all is there.

        Under torchrun the pieces are dealt out to the ranks, and each of them calls this; the folder is one that all of
        them see. Killed at any moment and called again, it goes on, and ends with the same lines.

        Raises:
            EvaluationError: another job has the folder, or it holds results of other settings.
        """
        with ranks() as team, self._opened(team), self._threads():
            settings = self.settings()
            _agree(team, settings, self.store)
            missing = team.shared(self.missing())
            own = missing[team.rank :: team.world]
            tasks = {task.name: task for task in self.tasks}
            models = [subject.model for subject in self.subjects]
            with contextlib.ExitStack() as stack:
                for model in models:
                    stack.enter_context(evaluating(_described(model)))
                for number, unit in enumerate(own):
                    if progress is not None:
                        progress(unit, number, len(own))
                    self._do(tasks[unit.task], unit, team)
            team.wait()
            if team.rank == 0:
                self._merge()
            team.wait()

    def _do(self, task: Task, unit: Unit, team: Ranks) -> None:
        group = self._group(task, unit)
        begun = time.perf_counter()
        with counted_passes(task.model) as passes:
            outcome = task.run(group)
        seconds = time.perf_counter() - begun
        named = {"subject": task.subject, "attack": task.attack, "seed": unit.seed}
        self.store.write(unit, [named | line for line in outcome.lines], outcome.tensors)
        self.store.note_time(unit, team.rank, seconds, passes[0])

    def _merge(self) -> None:
        """All lines in one file, in the order of tasks, runs and groups."""
        lines = [json.dumps(line, allow_nan=False) for unit in self.units() for line in self.store.lines(unit)]
        write_text(self.store.folder / "results.jsonl", "".join(line + "\n" for line in lines))

    def _group(self, task: Task, unit: Unit) -> Group:
        rows = self._positions(task, unit.group)
        chosen, where = self.images, slice(rows.start, rows.stop)
        positions = chosen.positions[where]
        return Group(
            chosen.images[where].to(_device(task.model)),
            chosen.labels[where].to(_device(task.model)),
            positions,
            run_indices(positions, unit.seed),
        )

    def _positions(self, task: Task, group: int) -> range:
        """The rows of a group."""
        count = len(self.images) if task.limit is None else min(task.limit, len(self.images))
        size = self.protocol.group
        return range(group * size, min((group + 1) * size, count))

    def _passes(self, task: Task) -> int | None:
        """Backbone passes per image of a task."""
        model = task.model
        if not isinstance(model, PurifiedClassifier):
            return 0
        once = model.purifier.passes
        if isinstance(task, ControlTask):
            return once * (task.answers + task.repurifications + task.search)
        if isinstance(task, GradientTask):
            return once * task.samples
        assert isinstance(task, AttackTask)
        cost = self._rehearsed(task.how, model)
        return None if cost is None else cost.passes + once * (task.answers + task.repurifications)

    def _rehearsed(self, attack: Attack, model: PurifiedClassifier) -> AttackCost | None:
        with torch.no_grad():
            classes = model.undefended(self.images.images[:1].to(_device(model))).shape[1]
        return rehearse(attack, model, classes)

    @contextlib.contextmanager
    def _opened(self, team: Ranks) -> Iterator[None]:
        """The folder locked by the first rank; all ranks raise where it cannot be had."""
        with contextlib.ExitStack() as stack:
            refusal = None
            if team.rank == 0:
                try:
                    stack.enter_context(self.store.locked())
                except CmapError as error:
                    refusal = str(error)
            refusal = team.shared(refusal)
            if refusal is not None:
                raise EvaluationError(refusal)
            yield

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _first_answer(self, subject: Subject) -> list[float]:
        """What a model, without its defence, answers to the first image: it fits, and has the classes of the labels."""
        model = subject.model
        first = self.images.images[:1].to(_device(model))
        with torch.no_grad(), isolated(0), evaluating(_described(model)):
            outputs = first_outputs(model, first, subject.name)
        logits = check_logits(outputs, 1)
        if not isinstance(model, (PurifiedClassifier, _Undefended)):  # which have said it
            warn_of_probabilities(model, outputs)
        self.images.check_classes(logits.shape[1], subject.name)
        return describe_answer(logits)


class _Undefended(functools.partial[torch.Tensor]):
    """The method ``undefended`` of a purified classifier."""

    @property
    def wrapper(self) -> PurifiedClassifier:
        return self.func.__self__  # pyright: ignore[reportFunctionMemberAccess]


def _device(model: Model) -> torch.device:
    """Where a model is; the CPU for one without weights."""
    described = model.wrapper if isinstance(model, _Undefended) else model
    parts = (described.backbone,) if isinstance(described, PurifiedClassifier) else ()
    found = [device_of(part) for part in (*parts, described)]
    return next((device for device in found if device is not None), torch.device("cpu"))


def _described(model: Model) -> object:
    """What a model's description is made from."""
    return model.wrapper.classifier if isinstance(model, _Undefended) else model


def _in_unit(model: Model) -> Model:
    """The model on images in [0, 1]."""
    if not callable(model) or isinstance(model, type):
        raise SettingsError(f"A model takes images and returns logits, but this is {model!r}.")
    if isinstance(model, PurifiedClassifier) and model.preprocessing.inputs != "unit":
        return model.variant(hooks=True, inputs="unit")
    return model


def fixed_chunk(model: Model, recorded: Mapping[str, Any] | None, device: torch.device | None = None) -> Model:
    """The model, on a CUDA device with a chunk size that stays: what fits there depends on what else is in its memory.

    recorded: its description in the folder, whose chunk size is taken again. device: None for the model's own.
    """
    device = device or _device(model)
    if not isinstance(model, PurifiedClassifier) or model.max_parallel is not None or device.type != "cuda":
        return model
    chunk = (recorded or {}).get("max_parallel")
    with ranks() as team:
        if chunk is None:
            conditional = getattr(model.backbone, "num_classes", None) is not None
            one_pass = model.purifier.network_pass(model.backbone, device)
            chunk = default_max_parallel(one_pass, model.image_shape, device, conditional=conditional)
        return model.variant(hooks=True, max_parallel=team.shared(chunk))


def _attacks(attacks: str | Mapping[str, Attack], threat: ThreatModel | None) -> dict[str, Attack]:
    if isinstance(attacks, str):
        if attacks not in SUITES:
            raise SettingsError(f"There is no set of attacks {attacks!r}.{near_matches(attacks, set(SUITES))}")
        return SUITES[attacks](threat or ThreatModel())
    if threat is not None:
        raise SettingsError("threat belongs to a set of attacks by name; attacks of your own have theirs.")
    if not isinstance(attacks, Mapping):
        raise SettingsError(
            f"attacks must be the name of a set or attacks by name, such as {{'pgd': PGD(...)}}, but are "
            f"{type(attacks).__name__}."
        )
    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise SettingsError(f"attacks[{name!r}] must be an attack such as PGD(...), but is {attack!r}.")
        if name == "control":
            raise SettingsError('"control" is the name of the clean images: give the attack another.')
    return dict(attacks)


def _agree(team: Ranks, settings: dict[str, Any], store: Store) -> None:
    """The folder belongs to these settings, and all ranks to each other; all of them raise where not."""
    refusal = None
    if team.rank == 0:
        try:
            store.begin(settings)
        except CmapError as error:
            refusal = str(error)
    refusal = team.shared(refusal)
    other = None
    if refusal is None and team.rank != 0:
        try:
            store.begin(settings, first=False)
        except CmapError as error:
            other = f"Rank {team.rank} was started with other settings than the first, or elsewhere: {error}"
    refusal = refusal or team.first_of(other)
    if refusal is not None:
        raise EvaluationError(refusal)
