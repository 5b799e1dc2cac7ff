"""``cmap-defense train``: a backbone from a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from PIL import Image
from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.backbones.load import load_backbone
from cmap_defense.backbones.networks import refuse_other_network
from cmap_defense.cli.figures import Curve, chart_row, sample_sheet
from cmap_defense.cli.output import checked_device, duration, print_json, using_threads
from cmap_defense.cli.progress import Progress
from cmap_defense.cli.train_data import classes_of, training_set
from cmap_defense.cli.train_options import (
    check_class_names,
    check_levels,
    network_of,
    objective_of,
    recorded_command,
    teacher_of,
)
from cmap_defense.data import write_image
from cmap_defense.ranks import Ranks, ranks
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.loop import LOG_FILE, TrainState, countdown
from cmap_defense.training.objectives import OBJECTIVES
from cmap_defense.training.run import TrainedBackbone, train_backbone

__all__ = ["loss_chart", "run_train"]

PAPERS = {
    "edm": "arXiv 2206.00364",
    "ct": "arXiv 2303.01469",
    "ict": "arXiv 2310.14189 (training), arXiv 2303.01469 (consistency models)",
    "ect": "arXiv 2406.14548 (training), arXiv 2303.01469 (consistency models)",
    "cd": "arXiv 2303.01469",
}
"""Where an objective comes from, for the record."""


def run_train(context: click.Context, out: Path, options: dict[str, Any], *, as_json: bool) -> None:
    """Carry out the command."""
    begun = time.perf_counter()
    seconds_left = None if options["minutes"] is None else countdown(options["minutes"])
    with using_threads(options["threads"]), ranks() as team:
        done = _trained(context, team, seconds_left, out, options)
        if team.rank != 0:
            return
    length = done.config.length
    seen = min(done.images_seen, length)
    files = {"backbone": str(out / "backbone"), "samples": str(out / "samples.png"), "loss": str(out / "loss.png")}
    loss, seconds = _losses(out / LOG_FILE)[-1]["loss"], time.perf_counter() - begun
    following = next_commands(out, options) if done.finished else []
    if as_json:
        counted = {"images": length, "images_seen": seen, "finished": done.finished}
        print_json(files | counted | {"loss": loss, "seconds": seconds, "next": following})
        return
    if seen < done.config.warmup_images:
        click.echo(
            f"Only {seen:,} images were trained on, fewer than the warm-up of {done.config.warmup_images:,}: this "
            "backbone knows hardly anything yet.",
            err=True,
        )
    if not done.finished:
        click.echo(f"Stopped after {seen} of {length} images: the same command continues.")
    took = f"{seconds:.0f} s" if seconds < 120 else duration(seconds)
    click.echo(f"Mean loss of the last steps {loss:.4g}; {seen:,} images seen; this call took {took}.")
    click.echo(f"Backbone: {files['backbone']}\nSamples: {files['samples']}\nLoss: {files['loss']}")
    if following:
        click.echo("Next, with your own classifier where it is not the embedded one:")
        click.echo("\n".join(f"  {line}" for line in following))


def next_commands(out: Path, options: dict[str, Any]) -> list[str]:
    """What to do with the backbone of a finished training: command lines and a line of Python, each for itself."""
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
    context: click.Context,
    team: Ranks,
    seconds_left: Callable[[], float] | None,
    out: Path,
    options: dict[str, Any],
) -> TrainedBackbone:
    own_gpu = options["device"] == "cuda" and team.world > 1
    device = checked_device(f"cuda:{team.local}" if own_gpu else options["device"])
    if options["network"] == "compact":
        check_levels(options)
    teacher = teacher_of(options, device)
    objective = objective_of(options, teacher)
    names = [field.name for field in dataclasses.fields(TrainingConfig) if field.name in options]
    config = TrainingConfig(**{name: options[name] for name in names}).replace(device=str(device))
    start = None if options["start_from"] is None else load_backbone(options["start_from"])
    chosen = training_set(
        options, next((model.image_shape[0] for model in (start, teacher) if model is not None), None)
    )
    classes = classes_of(chosen.source, chosen.where) if options["class_conditional"] else None
    class_names = None if classes is None else chosen.source.class_names
    network = network_of(options, chosen.shape, classes)
    if teacher is not None and teacher.image_shape != network.image_shape:
        raise click.BadParameter(f"it is for images {teacher.image_shape}.", param_hint="--teacher")
    if teacher is not None and teacher.num_classes not in (None, classes):
        raise click.BadParameter(f"it knows {teacher.num_classes} classes, not {classes}.", param_hint="--teacher")
    for option, model in (("--teacher", teacher), ("--from", start)):
        check_class_names(model, class_names, option)
    noise = NoiseRange() if start is None else start.noise
    if teacher is not None and teacher.noise != noise:
        raise click.BadParameter(f"its noise levels are {teacher.noise}, not {noise}.", param_hint="--teacher")
    if start is not None:
        refuse_other_network(network.build("meta"), start.network)
    data = chosen.loaded()

    def record(planned: TrainingConfig) -> dict[str, Any]:
        command = recorded_command(context.command.params, context.params, planned, network, objective)
        training = {name: options[name] for name in ("data", "hold_out", "compile")} | {"command": command}
        if class_names is not None:
            training["class_names"] = list(class_names)
        named = {name: options[name] for name in ("name", "description", "licence")}
        return named | {"paper": PAPERS[objective.name], "training": training}

    def on_samples(samples: Tensor) -> None:
        write_image(sample_sheet(samples), out / "samples.png")
        write_image(loss_chart(out / LOG_FILE), out / "loss.png")

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(config.steps, "training")) if team.rank == 0 else None
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
            on_step=None if progress is None else functools.partial(_advance, progress),
            on_samples=on_samples,
        )


def _advance(progress: Progress, state: TrainState) -> None:
    progress.at(state.step, state.steps, remark=f"loss={state.loss:.3f}")


def loss_chart(log: Path) -> Image.Image:
    """The mean losses of a log over the images seen, each in the middle of the images that it is of."""
    rows = _losses(log)
    ends = [0, *(row["images"] for row in rows)]
    unit = next(10**e for e in range(18) if ends[-1] < 1000 * 10**e)
    middles = [(first + last) / 2 / unit for first, last in itertools.pairwise(ends)]
    label = "images seen" if unit == 1 else f"images seen, in units of {unit:,}"
    curve = Curve("mean loss", [row["loss"] for row in rows], x=middles)
    return chart_row({"loss of the training": [curve]}, x_label=label, targets={})


def _losses(log: Path) -> list[dict[str, Any]]:
    """The lines of a training's log."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
