"""``cmap-defense train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.choices import DATASETS, NETWORKS, OBJECTIVES, PRESETS, WEIGHTS_DTYPES
from cmap_defense.cli.commands.shared import (
    DATA,
    RUNNING,
    device_option,
    json_option,
    out_option,
    threads_option,
)
from cmap_defense.cli.grouped import Command, options_of
from cmap_defense.training.config import DEFAULT_IMAGES, PRECISIONS, TrainingConfig

__all__ = ["Integers", "Pair", "train"]

_LOOP = TrainingConfig()

RECORD = options_of("Record and weights")
OBJECTIVE = options_of("Objective")
NETWORK = options_of("Network")
TRAINING = options_of("Training")


class Integers(click.ParamType):
    """Comma-separated integers."""

    name = "integers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if value in ("", "none"):
            return ()
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of integers.", param, ctx)


class Pair(click.ParamType):
    """``key=value``, the value in JSON, or else text as it is."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not key=value.", param, ctx)
        try:
            return key, json.loads(text)
        except ValueError:
            return key, text


@click.command(cls=Command)
@DATA(
    "--data",
    required=True,
    help=f"Data set: a name ({', '.join(DATASETS)}), an .npz file with images (uint8 [N, H, W, C]), or a folder of "
    "images.",
)
@DATA(
    "--hold-out",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of images to leave out: the last ones, or of a folder a draw over all classes.",
)
@DATA("--size", type=click.IntRange(1), help="Resize and crop the images of a folder to this many pixels.")
@DATA(
    "--image-channels",
    type=click.IntRange(1),
    show_default="those of --from, or 3",
    help="Channels in which the images of a folder are read: 3, or 1 for grey.",
)
@DATA("--class-conditional", is_flag=True, help="Condition the network on the labels of the data.")
@DATA(
    "--flip/--no-flip", default=_LOOP.flip, show_default=True, help="Mirror each image with a probability of one half."
)
@OBJECTIVE(
    "--objective", type=click.Choice(OBJECTIVES), default="ect", show_default=True, help="Objective to minimise."
)
@OBJECTIVE(
    "--objective-set",
    type=Pair(),
    multiple=True,
    help="Set one of the objective's settings to this value. May be repeated.",
)
@OBJECTIVE(
    "--halvings",
    type=click.IntRange(0),
    help="Number of times that the gap between noise levels is halved, for the objective ect.",
)
@OBJECTIVE("--teacher", help="Denoiser to distil, for the objective cd: a folder, a name or a Hub id.")
@NETWORK("--network", type=click.Choice(NETWORKS), default="compact", show_default=True, help="Network to train.")
@NETWORK(
    "--preset",
    type=click.Choice(PRESETS),
    show_default="small",
    help="Configuration of the compact network that the following options change.",
)
@NETWORK(
    "--channels",
    type=Integers(),
    show_default="the preset's",
    help="Width of each level of the compact network, finest first, with commas between them.",
)
@NETWORK(
    "--attention",
    type=Integers(),
    show_default="the preset's",
    help='Levels of the compact network with attention, 0 being the finest, or "none".',
)
@NETWORK(
    "--blocks",
    type=click.IntRange(1),
    show_default="the preset's",
    help="Number of residual blocks per level of the compact network.",
)
@NETWORK(
    "--patch",
    type=click.IntRange(1),
    show_default="the preset's",
    help="Side of the patches that the compact network turns into channels.",
)
@NETWORK(
    "--set",
    "network_set",
    type=Pair(),
    multiple=True,
    help="Set one of the network's settings to this value. May be repeated.",
)
@NETWORK("--from", "start_from", help="Backbone whose weights the training starts from: a folder, a name or a Hub id.")
@TRAINING(
    "--images",
    type=click.IntRange(1),
    show_default=f"{DEFAULT_IMAGES}, or what --minutes allow",
    help="Length of the training in images, counted with repetition.",
)
@TRAINING(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Stop after this many minutes; the same command then continues.",
)
@TRAINING(
    "--batch-size",
    type=click.IntRange(1),
    default=_LOOP.batch_size,
    show_default=True,
    help="Images per optimiser step, over all processes.",
)
@TRAINING(
    "--learning-rate",
    type=float,
    default=_LOOP.learning_rate,
    show_default=True,
    help="Largest learning rate. It falls along a half cosine to 0.",
)
@TRAINING(
    "--warmup-images",
    type=click.IntRange(0),
    default=_LOOP.warmup_images,
    show_default=True,
    help="Images over which the learning rate warms up.",
)
@TRAINING(
    "--clip-norm",
    type=float,
    default=_LOOP.clip_norm,
    show_default=True,
    help="Largest norm of the gradient. Larger gradients are scaled down to it.",
)
@TRAINING(
    "--ema-half-life",
    type=Integers(),
    default=",".join(map(str, _LOOP.ema_half_life)),
    show_default=True,
    help="Half-life of the averaged weights in images. Of several with commas the first one's average is the backbone.",
)
@TRAINING(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=_LOOP.precision,
    show_default=True,
    help="Precision of the network's arithmetic; auto is bfloat16 where the device multiplies it natively.",
)
@TRAINING(
    "--seed",
    type=click.IntRange(0),
    default=_LOOP.seed,
    show_default=True,
    help="Seed of the initial weights, the order of the data and the noise.",
)
@TRAINING(
    "--checkpoint-every",
    type=click.IntRange(1),
    default=_LOOP.checkpoint_every,
    show_default=True,
    help="Number of images between checkpoints.",
)
@RUNNING(
    "--checkpoint-part-mb",
    type=click.IntRange(1),
    show_default="no limit",
    help="Size in megabytes at which a checkpoint is divided into several files.",
)
@RUNNING(
    "--micro-batch",
    type=click.IntRange(1),
    show_default="all of its batch",
    help="Number of images that each process computes at the same time.",
)
@RUNNING("--compile", is_flag=True, help="Run the network through torch.compile.")
@RUNNING(
    "--channels-last/--no-channels-last",
    default=None,
    show_default="on CUDA",
    help="Lay the weights out with the channels last.",
)
@RUNNING(
    "--hold-images/--no-hold-images",
    default=None,
    show_default="where they fit",
    help="Keep all images in the memory of the device.",
)
@threads_option
@device_option
@RECORD("--name", default="my-backbone", show_default=True, help="Name of the backbone in its record.")
@RECORD("--description", default="", help="Description of the backbone in its record.")
@RECORD("--licence", default="", help="Licence of the weights in the record.")
@RECORD(
    "--weights",
    type=click.Choice(WEIGHTS_DTYPES),
    default="float32",
    show_default=True,
    help="Precision of the weights in the file that is written.",
)
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
    from cmap_defense.cli.train import run_train

    run_train(context, out, options, as_json=as_json)
