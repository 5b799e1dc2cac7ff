"""``cmap-defense train``: a backbone from a data set."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.backbones.load import load_backbone
from cmap_defense.cli.figures import Curve, chart_row, sample_sheet
from cmap_defense.cli.output import checked_device, json_option, out_option, print_json, progress
from cmap_defense.cli.train_data import classes_of, training_set
from cmap_defense.cli.train_options import (
    Integers,
    Pair,
    check_class_names,
    check_levels,
    network_of,
    objective_of,
    recorded_command,
    teacher_of,
)
from cmap_defense.data import DATASETS, write_image
from cmap_defense.ranks import Ranks, ranks
from cmap_defense.training.budget import Budget
from cmap_defense.training.loop import LOG_FILE, TrainState
from cmap_defense.training.networks import NETWORKS, PRESETS
from cmap_defense.training.objectives import OBJECTIVES
from cmap_defense.training.run import TrainedBackbone, train_backbone
from cmap_defense.training.settings import PRECISIONS, Execution, TrainSettings
from cmap_defense.training.start import refuse_other_network, source_of

__all__ = ["loss_chart", "train"]

_LOOP = TrainSettings()

PAPERS = {
    "edm": "arXiv 2206.00364",
    "ct": "arXiv 2303.01469",
    "ict": "arXiv 2310.14189 (training), arXiv 2303.01469 (consistency models)",
    "ect": "arXiv 2406.14548 (training), arXiv 2303.01469 (consistency models)",
    "cd": "arXiv 2303.01469",
}
"""Where an objective comes from, for the record."""


@click.command()
@click.option(
    "--data",
    required=True,
    help=f"A name ({', '.join(DATASETS)}), an .npz file with images (uint8 [N, H, W, C]), a folder of images.",
)
@click.option(
    "--hold-out",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Images to leave out: the last ones, or of a folder a draw over all classes.",
)
@click.option("--size", type=click.IntRange(1), help="Resize and crop the images of a folder to this many pixels.")
@click.option(
    "--image-channels",
    type=click.IntRange(1),
    help="In which a folder is read: 3 or 1.  [default: those of --from, or 3]",
)
@click.option("--class-conditional", is_flag=True, help="Tell the network the labels of the data.")
@click.option("--name", default="my-backbone", show_default=True, help="Name in the record.")
@click.option("--description", default="", help="What it is, in the record.")
@click.option("--licence", default="", help="Licence of the weights, in the record.")
@click.option("--objective", type=click.Choice(list(OBJECTIVES)), default="ect", show_default=True)
@click.option("--objective-set", type=Pair(), multiple=True, help="A setting of the objective; may be repeated.")
@click.option("--halvings", type=click.IntRange(0), help="Of the noise levels' gap, for the objective ect.")
@click.option("--from", "start_from", help="Start from these weights: a folder, a name or a Hub id.")
@click.option("--teacher", help="The denoiser to distil, for the objective cd: a folder, a name or a Hub id.")
@click.option("--network", type=click.Choice(NETWORKS), default="compact", show_default=True)
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Of the compact network.  [default: small]")
@click.option("--set", "network_set", type=Pair(), multiple=True, help="A setting of the network; may be repeated.")
@click.option("--channels", type=Integers(), help="Width of each level, finest first.  [default: the preset's]")
@click.option(
    "--attention", type=Integers(), help="Levels with attention, 0 being the finest, or none.  [default: the preset's]"
)
@click.option("--blocks", type=click.IntRange(1), help="Residual blocks per level.  [default: the preset's]")
@click.option("--patch", type=click.IntRange(1), help="Space-to-depth patch.  [default: the preset's]")
@click.option(
    "--images",
    type=click.IntRange(1),
    help=f"Images to train on, with repetition.  [default: {_LOOP.images}, or what --minutes allow]",
)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Stop this call then, to be continued.")
@click.option("--batch-size", type=click.IntRange(1), default=_LOOP.batch_size, show_default=True)
@click.option(
    "--learning-rate",
    type=float,
    default=_LOOP.learning_rate,
    show_default=True,
    help="The highest; it falls along a half cosine to 0.",
)
@click.option(
    "--warmup-images", type=click.IntRange(0), default=_LOOP.warmup_images, show_default=True, help="It rises over."
)
@click.option("--clip-norm", type=float, default=_LOOP.clip_norm, show_default=True, help="Of the gradient.")
@click.option(
    "--ema-half-life",
    "ema_half_lives",
    type=Integers(),
    default=",".join(map(str, _LOOP.ema_half_lives)),
    show_default=True,
    help="In images; several with commas, the first being kept as the backbone.",
)
@click.option("--flip/--no-flip", default=_LOOP.flip, show_default=True, help="Mirror each image with probability 1/2.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=_LOOP.precision,
    show_default=True,
    help="Precision of the network's arithmetic; auto is bfloat16 where the device multiplies it natively.",
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision of the file.",
)
@click.option(
    "--checkpoint-every", type=click.IntRange(1), default=_LOOP.checkpoint_every, show_default=True, help="In images."
)
@click.option("--checkpoint-part-mb", type=click.IntRange(1), help="Largest file of a checkpoint.  [default: no limit]")
@click.option("--micro-batch", type=click.IntRange(1), help="Images at a time in each process.  [default: all]")
@click.option("--compile", is_flag=True, help="Run the network through torch.compile.")
@click.option("--channels-last/--no-channels-last", default=None, help="Layout of the weights.  [default: on CUDA]")
@click.option("--hold-images/--no-hold-images", default=None, help="All on the device.  [default: where they fit]")
@click.option("--device", default="cpu", show_default=True, help="Where to train, such as cuda.")
@click.option("--seed", type=click.IntRange(0), default=_LOOP.seed, show_default=True)
@out_option()
@json_option
@click.pass_context
def train(context: click.Context, out: Path, as_json: bool, **options: Any) -> None:
    """Train a backbone and write it to OUT/backbone: a consistency model, or a denoiser (--objective edm).

    Killed, interrupted or stopped by --minutes, the same command continues where the last checkpoint was, and ends
    with the same weights. Under torchrun (torchrun -m cmap_defense train ...) all processes share each batch.
    OUT/samples.png shows 64 samples, always from the same noise; OUT/loss.png the loss.

    With --minutes and without --images, the training is as long as fits into the minutes; OUT/plan.json keeps that
    length for the calls that continue it.
    """
    budget = None if options["minutes"] is None else Budget(options["minutes"])
    with ranks() as team:
        done = _trained(context, team, budget, out, options)
        if team.rank != 0:
            return
    seen = min(done.images_seen, done.settings.images)
    files = {"backbone": str(out / "backbone"), "samples": str(out / "samples.png"), "loss": str(out / "loss.png")}
    if as_json:
        print_json(files | {"images": done.settings.images, "images_seen": seen, "finished": done.finished})
        return
    if seen < done.settings.warmup_images:
        click.echo(
            f"Only {seen:,} images were trained on, fewer than the warm-up of {done.settings.warmup_images:,}: this "
            "backbone knows hardly anything yet.",
            err=True,
        )
    if not done.finished:
        click.echo(f"Stopped after {seen} of {done.settings.images} images: the same command continues.")
    click.echo(f"Backbone: {files['backbone']}\nSamples: {files['samples']}\nLoss: {files['loss']}")


def _trained(
    context: click.Context, team: Ranks, budget: Budget | None, out: Path, options: dict[str, Any]
) -> TrainedBackbone:
    own_gpu = options["device"] == "cuda" and team.world > 1
    device = checked_device(f"cuda:{team.local}" if own_gpu else options["device"])
    if options["network"] == "compact":
        check_levels(options)
    teacher = teacher_of(options, device)
    objective = objective_of(options, teacher)
    loop = {name: options[name] for name in TrainSettings().to_dict() if name not in ("images", "betas")}
    settings = TrainSettings(**loop, images=options["images"] or _LOOP.images)
    start = None if options["start_from"] is None else load_backbone(options["start_from"])
    chosen = training_set(
        options, next((model.image_shape[0] for model in (start, teacher) if model is not None), None)
    )
    classes = classes_of(chosen.source, chosen.where) if options["class_conditional"] else None
    class_names = None if classes is None else chosen.source.class_names
    network = network_of(options, chosen.shape, classes)
    sources = {role: source_of(model) for role, model in (("from", start), ("teacher", teacher)) if model is not None}
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

    def described(planned: TrainSettings) -> dict[str, Any]:
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
        bar = stack.enter_context(progress(settings.steps, "training")) if team.rank == 0 else None
        return train_backbone(
            data.images,
            out,
            network=network,
            objective=objective,
            settings=settings,
            described=described,
            labels=None if classes is None else data.labels,
            start=start,
            sources=sources,
            budget=budget,
            plan=options["images"] is None,
            execution=Execution(
                compile=options["compile"],
                channels_last=options["channels_last"],
                hold_images=options["hold_images"],
                part_mb=options["checkpoint_part_mb"],
                micro_batch=options["micro_batch"],
            ),
            device=str(device),
            weights_dtype=getattr(torch, options["weights"]),
            on_step=None if bar is None else functools.partial(_advance, bar),
            on_samples=on_samples,
        )


def _advance(bar: tqdm[Any], state: TrainState) -> None:
    bar.total = state.steps
    bar.update(state.step - bar.n)
    bar.set_postfix(loss=f"{state.loss:.3f}", refresh=False)


def loss_chart(log: Path) -> Image.Image:
    """The mean losses of a log over the images seen."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    last = rows[-1]["images"]
    unit = next(10**e for e in range(18) if last < 1000 * 10**e)
    values = [
        next(row["loss"] for row in rows if row["images"] >= min(n * unit, last))
        for n in range(math.ceil(last / unit) + 1)
    ]
    label = "images seen" if unit == 1 else f"images seen, in units of {unit:,}"
    return chart_row({"mean loss since the last checkpoint": [Curve("loss", values)]}, x_label=label, targets={})
