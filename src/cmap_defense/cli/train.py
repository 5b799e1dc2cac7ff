"""``cmap-defense train``: a backbone from a data set."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from cmap_defense.backbones.load import load_backbone
from cmap_defense.backbones.networks import Network, refuse_other_network
from cmap_defense.cli.build import device_of, settings_of, using_threads
from cmap_defense.cli.output import duration, print_json
from cmap_defense.cli.pictures import sample_sheet, write_line_charts
from cmap_defense.cli.train_options import (
    check_class_names,
    check_teacher,
    network_changes,
    objective_of,
    recorded_command,
    teacher_of,
    training_set,
)
from cmap_defense.common.progress import Progress
from cmap_defense.common.ranks import Ranks, ranks
from cmap_defense.data import write_image
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.loop import LOG_FILE, TrainState, countdown
from cmap_defense.training.objectives import OBJECTIVES
from cmap_defense.training.run import TrainedBackbone, train_backbone

PAPERS = {
    "edm": "arXiv 2206.00364",
    "ct": "arXiv 2303.01469",
    "ict": "arXiv 2310.14189 (training), arXiv 2303.01469 (consistency models)",
    "ect": "arXiv 2406.14548 (training), arXiv 2303.01469 (consistency models)",
    "cd": "arXiv 2303.01469",
}
"""Papers of the objectives, for the record."""


def run_train(context: click.Context, options: dict[str, Any]) -> None:
    """Carry out the command with its context and its options."""
    begun, out = time.perf_counter(), options["out"]
    seconds_left = None if options["minutes"] is None else countdown(options["minutes"])
    with using_threads(options["threads"]), ranks() as team:
        done = _trained(context, team, seconds_left, options)
        if team.rank != 0:
            return
    length, warmup = done.config.length, done.config.warmup_images
    seen = min(done.images_seen, length)
    files = {name: str(out / file) for name, file in (("backbone", "backbone"), ("samples", "samples.png"))}
    if (out / "loss.png").is_file():
        files["loss_chart"] = str(out / "loss.png")
    loss, seconds = _log_rows(out / LOG_FILE)[-1]["loss"], time.perf_counter() - begun
    following = next_commands(options) if done.finished else []
    if options["as_json"]:
        counted = {"images": length, "images_seen": seen, "finished": done.finished}
        print_json(files | counted | {"loss": loss, "seconds": seconds, "next": following})
        return
    if seen < warmup:
        click.echo(
            f"Only {seen:,} images were trained on, fewer than the warm-up of {warmup:,}: this backbone has hardly "
            "been trained. Give more --images, or fewer --warmup-images.",
            err=True,
        )
    if not done.finished:
        click.echo(f"Stopped after {seen} of {length} images: the same command continues.")
    took = f"{seconds:.0f} s" if seconds < 120 else duration(seconds)
    click.echo(f"Mean loss of the last steps {loss:.4g}; {seen:,} images seen; this call took {took}.")
    click.echo("\n".join(f"{name.capitalize().replace('_', ' ')}: {file}" for name, file in files.items()))
    if following:
        click.echo("Next, with your own classifier where it is not the embedded one:")
        click.echo("\n".join(f"  {line}" for line in following))


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
    context: click.Context, team: Ranks, seconds_left: Callable[[], float] | None, options: dict[str, Any]
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

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(config.steps, "training")) if team.rank == 0 else None

        def on_step(state: TrainState) -> None:
            if progress is not None:
                progress.at(state.step, state.steps, remark=f"loss={state.loss:.3f}")

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
            on_step=on_step,
            on_samples=on_samples,
        )


def write_loss_chart(log: Path, path: Path) -> Path | None:
    """Draw the mean losses of a log over the images seen, each in the middle of its images."""
    rows = _log_rows(log)
    ends = [0, *(row["images"] for row in rows)]
    middles = [(first + last) / 2 for first, last in itertools.pairwise(ends)]
    return write_line_charts(
        path, {"Loss of the training": {"mean loss": (middles, [row["loss"] for row in rows])}}, "images seen"
    )


def _log_rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
