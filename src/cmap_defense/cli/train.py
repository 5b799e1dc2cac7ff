"""``cmap-defense train``: a backbone from a data set."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from cmap_defense.backbones.karras import EDMDenoiser, KarrasModel, NoiseRange
from cmap_defense.backbones.load import load_backbone
from cmap_defense.backbones.networks import PRESETS, Network, refuse_other_network
from cmap_defense.cli.build import Printed, device_of, settings_of, usage_errors
from cmap_defense.cli.options import command_text
from cmap_defense.cli.output import duration, sample_sheet, write_line_charts
from cmap_defense.common.ranks import ranks
from cmap_defense.data import FolderImages, ImageSource, LabelledImages, open_dataset, write_image
from cmap_defense.data.subset import Subset
from cmap_defense.errors import DataError, WrongKindError
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.loop import LOG_FILE, countdown, read_log
from cmap_defense.training.objectives import OBJECTIVES, Objective
from cmap_defense.training.run import TrainedBackbone, source_of, train_backbone

PAPERS = {
    "edm": "arXiv 2206.00364",
    "ct": "arXiv 2303.01469",
    "ict": "arXiv 2310.14189 (training), arXiv 2303.01469 (consistency models)",
    "ect": "arXiv 2406.14548 (training), arXiv 2303.01469 (consistency models)",
    "cd": "arXiv 2303.01469",
}
"""Papers of the objectives, for the record."""


def run_train(options: dict[str, Any]) -> Printed:
    """Carry out the command."""
    begun, out = time.perf_counter(), options["out"]
    seconds_left = None if options["minutes"] is None else countdown(options["minutes"])
    with ranks() as team:
        done = _trained(click.get_current_context(), seconds_left, options)
        if team.rank != 0:
            return None
    length, warmup = done.config.length, done.config.warmup_images
    seen = min(done.images_seen, length)
    files = {"backbone": str(out / "backbone"), "samples": str(out / "samples.png")}
    if (out / "loss.png").is_file():
        files["loss_chart"] = str(out / "loss.png")
    losses, seconds = [row["loss"] for row in read_log(out / LOG_FILE)], time.perf_counter() - begun
    following = next_commands(options) if done.finished else []
    if seen < warmup and not options["as_json"]:
        click.echo(
            f"Only {seen:,} images were trained on, fewer than the warm-up of {warmup:,}: this backbone has hardly "
            "been trained. Give more --images, or fewer --warmup-images.",
            err=True,
        )
    lines = [] if done.finished else [f"Stopped after {seen} of {length} images: the same command continues."]
    took = f"{seconds:.0f} s" if seconds < 120 else duration(seconds)
    last = f"Mean loss of the last steps {losses[-1]:.4g}; " if losses else ""
    lines.append(f"{last}{seen:,} images seen; this call took {took}.")
    lines += [f"{name.capitalize().replace('_', ' ')}: {file}" for name, file in files.items()]
    if following:
        lines.append("Next, with your own classifier where it is not the embedded one:")
        lines += [f"  {line}" for line in following]
    counted = {"images": length, "images_seen": seen, "finished": done.finished}
    return files | counted | {"loss": losses[-1] if losses else None, "seconds": seconds, "next": following}, lines


def next_commands(options: dict[str, Any]) -> list[str]:
    """What to do with the backbone of a finished training: command lines and a line of Python, each for itself."""
    out = options["out"]
    backbone, data = str(out / "backbone"), ["--data", options["data"]]
    if options["size"] is not None:
        data += ["--size", str(options["size"])]
    if OBJECTIVES[options["objective"]].kind == "denoiser":
        distil = ["train", *data, "--objective", "cd", "--teacher", backbone, "--out", f"{out}-distilled"]
        return [shlex.join(["cmap-defense", *distil])]
    embedded = options["data"] == "fashion-mnist"
    named = ["--backbone", backbone, "--classifier", "embedded" if embedded else "my_models.py:classifier"]
    quality = ["cmap-defense", "quality", *named, *data, "--out", str(out / "quality")]
    return [shlex.join(quality), f"PurifiedClassifier(my_classifier, backbone={backbone!r})"]


def _trained(
    context: click.Context, seconds_left: Callable[[], float] | None, options: dict[str, Any]
) -> TrainedBackbone:
    device, out = device_of(options), options["out"]
    changes = network_changes(options)
    teacher = teacher_of(options, device)
    objective = objective_of(options, teacher)
    config = settings_of(TrainingConfig, options | {"device": str(device)})
    start = None if options["start_from"] is None else load_backbone(options["start_from"])
    others = {"--from": start, "--teacher": teacher}
    chosen = training_set(options, next((model.image_shape[0] for model in others.values() if model is not None), None))
    classes = chosen.classes() if options["class_conditional"] else None
    class_names = None if classes is None else chosen.source.class_names
    network = Network.named(options["network"], chosen.shape, changes, num_classes=classes)
    for option, model in others.items():
        check_class_names(model, class_names, option)
    if teacher is not None:
        check_teacher(teacher, network, start)
    if start is not None:
        refuse_other_network(network.build("meta"), start.network)
    data = chosen.loaded()

    def record(planned: TrainingConfig) -> dict[str, Any]:
        command = recorded_command(context, planned, network, objective)
        training = {name: options[name] for name in ("data", "hold_out", "compile")} | {"command": command}
        if class_names is not None:
            training["class_names"] = list(class_names)
        named = {name: options[name] for name in ("name", "description", "licence")}
        return named | {"paper": PAPERS[objective.name], "training": training}

    def on_samples(samples: Tensor) -> None:
        write_image(sample_sheet(samples), out / "samples.png")
        write_loss_chart(out / LOG_FILE, out / "loss.png")

    return train_backbone(
        data.images,
        out,
        network=network,
        objective=objective,
        config=config,
        labels=None if classes is None else data.labels,
        start=start,
        record=record,
        seconds_left=seconds_left,
        on_samples=on_samples,
        progress=True,
    )


def write_loss_chart(log: Path, path: Path) -> Path | None:
    """Draw the mean losses of a log over the images seen, each in the middle of its images; None where it has none."""
    rows = read_log(log)
    if not rows:
        return None
    ends = [0, *(row["images"] for row in rows)]
    middles = [(first + last) / 2 for first, last in itertools.pairwise(ends)]
    return write_line_charts(
        path, {"Loss of the training": {"mean loss": (middles, [row["loss"] for row in rows])}}, "images seen"
    )


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
        "noise levels": (teacher.noise, NoiseRange() if start is None else start.noise),
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
