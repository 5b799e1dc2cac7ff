"""What the options of ``cmap-defense train`` stand for: images, a network, an objective, and the command itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import click
import torch

from cmap_defense.backbones.karras import EDMDenoiser, KarrasModel
from cmap_defense.backbones.load import load_backbone
from cmap_defense.backbones.networks import PRESETS, Network
from cmap_defense.cli.build import usage_errors
from cmap_defense.cli.options import command_text
from cmap_defense.data import FolderImages, ImageSource, LabelledImages, open_dataset
from cmap_defense.data.subset import Subset
from cmap_defense.errors import DataError, WrongKindError
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.objectives import OBJECTIVES, Objective
from cmap_defense.training.run import source_of

COMPACT = ("preset", "channels", "attention", "blocks", "patch")
"""Options that belong to the compact network; recorded commands have ``--set`` in their place."""

FREE = ("out", "as_json", "threads", "halvings", *COMPACT)
"""Options that a recorded command lacks, beside those that are free to change when a training is continued."""


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Images of a data set, chosen before they are read: those of a folder may take minutes."""

    source: ImageSource
    positions: Sequence[int]
    shape: tuple[int, int, int]

    def loaded(self) -> LabelledImages:
        """All of them, in memory."""
        source, positions = self.source, self.positions
        if isinstance(source, LabelledImages) and isinstance(positions, range):
            return source[positions.start : positions.stop]
        return source.select(positions)

    def classes(self) -> int:
        """The number of classes. Raises DataError where there are not two."""
        names = self.source.class_names
        count = len(names) if names is not None else int(self.source.labels.max()) + 1
        if count < 2:
            raise DataError(
                "The data have no labels of several classes, which --class-conditional needs: leave the option out, "
                "or give a folder of class folders or an .npz file with labels."
            )
        return count


def training_set(options: Mapping[str, Any], channels: int | None = None) -> TrainingSet:
    """The images of ``--data``, ``--size``, ``--image-channels`` (or ``channels``, for a folder) and ``--hold-out``.

    All images but the last ones; or, of a folder, but the first of a random subset, which ``--split train -n`` of the
    other commands takes: its images come class by class, and the last ones would be a class.
    """
    where, hold_out = options["data"], options["hold_out"]
    source = open_dataset(where, size=options["size"], channels=options["image_channels"])
    if isinstance(source, FolderImages) and source.channels is None:
        source = dataclasses.replace(source, channels=channels)
    total = len(source)
    if total == 0:
        raise DataError(f"{where} holds no images: give other data.")
    if hold_out >= total:
        raise DataError(f"--hold-out {hold_out} leaves nothing of the {total} images: give a smaller number.")
    positions: Sequence[int] = range(total - hold_out)
    if hold_out and isinstance(source, FolderImages):
        left_out = set(Subset(count=hold_out, order="random").indices(total))
        positions = [position for position in range(total) if position not in left_out]
    channels, height, width = source.select([0]).images.shape[1:]
    return TrainingSet(source, positions, (channels, height, width))


def network_changes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the network by ``--set``, and for the compact one by its own options."""
    changes, name = _once(options["network_set"], "--set"), options["network"]
    given = {option: options[option] for option in COMPACT if options[option] is not None}
    if name != "compact":
        if given:
            raise click.UsageError(
                f"--{next(iter(given))} belongs to the compact network: use --set for the settings of {name}."
            )
        return changes
    preset = PRESETS[given.pop("preset", "small")]
    levels = range(len(given.get("channels", preset["channels"])))
    attended = given.pop("attention", [level for level, flag in enumerate(preset["attention"]) if flag])
    unknown = [level for level in attended if level not in levels] if options["attention"] else []
    if unknown:
        raise click.BadParameter(
            f"there is no level {unknown[0]} of {len(levels)}: the finest is 0.", param_hint="--attention"
        )
    return {**preset, **given, "attention": tuple(level in attended for level in levels), **changes}


def objective_of(options: Mapping[str, Any], teacher: EDMDenoiser | None) -> Objective:
    """The objective of ``--objective`` and ``--objective-set``."""
    name, values = options["objective"], _once(options["objective_set"], "--objective-set")
    if options["halvings"] is not None:
        if name != "ect" or "halvings" in values:
            raise click.UsageError("--halvings sets halvings of the objective ect: give it once, for ect alone.")
        values["halvings"] = options["halvings"]
    if teacher is not None:
        conditional = teacher.num_classes is not None
        values |= {
            "teacher": teacher.denoise,
            "teacher_source": source_of(teacher),
            "class_conditional": conditional,
        }
    with usage_errors():
        return OBJECTIVES[name].from_dict(values)


def teacher_of(options: Mapping[str, Any], device: torch.device) -> EDMDenoiser | None:
    """The denoiser of ``--teacher``, for the objective cd; None for the other objectives."""
    if (options["objective"] == "cd") != (options["teacher"] is not None):
        raise click.UsageError("--teacher names the denoiser that --objective cd distils: give both, or neither.")
    if options["teacher"] is None:
        return None
    try:
        teacher = load_backbone(options["teacher"], kind="denoiser")
    except WrongKindError as error:
        raise click.BadParameter(str(error), param_hint="--teacher") from error
    if teacher.num_classes is not None and not options["class_conditional"]:
        raise click.BadParameter("it is class-conditional: add --class-conditional.", param_hint="--teacher")
    return teacher.to(device)


def check_teacher(teacher: EDMDenoiser, network: Network, start: KarrasModel | None) -> None:
    """Wrong usage where a teacher does not fit the network that learns from it."""
    found: dict[str, tuple[Any, Any]] = {
        "images": (teacher.image_shape, network.image_shape),
        "classes": (teacher.num_classes, network.num_classes if teacher.num_classes is not None else None),
        "noise levels": (teacher.noise, teacher.noise if start is None else start.noise),
    }
    for what, (its, others) in found.items():
        if its != others:
            raise click.BadParameter(
                f"its {what} are {its}, but those of the training {others}: give a teacher that fits.",
                param_hint="--teacher",
            )


def check_class_names(model: KarrasModel | None, names: Sequence[str] | None, option: str) -> None:
    """Wrong usage where a model was trained on the data's classes in another order, or on other classes."""
    record = None if model is None else model.record
    known = None if record is None else record.training.get("class_names")
    if known is not None and names is not None and list(known) != list(names):
        raise click.BadParameter(
            f"its classes are {', '.join(map(str, known))}, those of the data {', '.join(names)}: give data with the "
            "same class folders.",
            param_hint=option,
        )


def recorded_command(context: click.Context, config: TrainingConfig, network: Network, objective: Objective) -> str:
    """The command line of a training in full, without where it runs and writes."""
    kept = config.reproducible()
    fields = {field.name for field in dataclasses.fields(config)}
    free = {*FREE, *(fields - kept.keys() - {"weights", "compile"})}
    values = {name: value for name, value in context.params.items() if name not in free}
    values |= {"images": config.images, "precision": config.precision}
    values["network_set"] = tuple(network.changes.items())
    values["objective_set"] = tuple(objective.to_dict().items())
    return command_text("train", context.command.params, values)


def _once(pairs: Sequence[tuple[str, Any]], option: str) -> dict[str, Any]:
    """Pairs as a mapping; wrong usage where a key comes twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise click.BadParameter(f"{key} is set twice: give it once.", param_hint=option)
        values[key] = value
    return values
