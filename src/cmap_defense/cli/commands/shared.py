"""Options that several commands have."""

from __future__ import annotations

import fractions
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.choices import ATTACK_SETS, COUNT, RESIZE_MODES
from cmap_defense.cli.grouped import options_of
from cmap_defense.cli.paths import PathType
from cmap_defense.evaluation.protocol import Protocol

__all__ = [
    "MODEL",
    "OUTPUT",
    "RUNNING",
    "SEEDS",
    "Decorator",
    "Size",
    "attack_options",
    "check_options",
    "data_options",
    "device_option",
    "json_option",
    "model_options",
    "out_option",
    "protocol_options",
    "seed_option",
    "threads_option",
    "together",
    "writable_folder",
]

MODEL = options_of("Model")
DATA = options_of("Data")
PURIFICATION = options_of("Purification")
ATTACKS = options_of("Attacks")
PREDICTIONS = options_of("Predictions and runs")
CHECKS = options_of("Checks of the attacks")
RUNNING = options_of("Running")
OUTPUT = options_of("Output")

SEEDS = click.IntRange(0, 2**32 - 1)

PROTOCOL = Protocol()

Decorator = Callable[[Any], Any]


class Size(click.ParamType):
    """A number, or a fraction such as 8/255.

    zero: whether 0 is one. largest: the largest there is.
    """

    name = "number"

    def __init__(self, *, zero: bool = False, largest: float = math.inf) -> None:
        self.zero, self.largest = zero, largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            size = float(fractions.Fraction(str(value)))
        except (ValueError, ZeroDivisionError):
            size = -1.0
        if size < 0 or (size == 0 and not self.zero):
            self.fail(f"{value} is no size such as 0.05 or 8/255.", param, ctx)
        if size > self.largest:
            self.fail(
                f"{value} is above {self.largest:g}: eps is of images in [0, 1]; did you mean {value}/255?", param, ctx
            )
        return size


class _Channels(click.ParamType):
    """Numbers with commas between them, one per channel."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value} is not one number per channel, such as 0.49,0.48,0.45.", param, ctx)


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in this order in the help."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def writable_folder(context: click.Context, parameter: click.Parameter, folder: Path) -> Path:
    """``folder``, refused before any work is done when nothing can be written there."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise click.BadParameter(f"{folder} cannot be written to.", context, parameter)
    return folder


def out_option(default: str | None = None) -> Decorator:
    """``-o/--out DIR``: where a command writes; required when it has no default."""
    return OUTPUT(
        "-o",
        "--out",
        type=PathType(file_okay=False),
        default=default,
        callback=writable_folder,
        required=default is None,
        show_default=default is not None,
        help="Folder to write to. It is made when it is not there.",
    )


json_option = OUTPUT("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

threads_option = RUNNING(
    "--threads",
    type=click.IntRange(1),
    show_default="torch's choice",
    help="Threads of the CPU to compute with. Rounding, and so the results, depend on their number.",
)

device_option = RUNNING("--device", default="cpu", show_default=True, help="Device to compute on, such as cuda.")


def seed_option(what: str) -> Decorator:
    """``--seed``, with a sentence about what it decides."""
    return RUNNING("--seed", type=SEEDS, default=0, show_default=True, help=what)


latents_option = PURIFICATION(
    "--latents", type=click.IntRange(1), show_default="the backbone's", help="Number of latents per image (K)."
)
iterations_option = PURIFICATION(
    "--iterations",
    type=click.IntRange(1),
    show_default="the backbone's",
    help="Number of iterations of the latent optimisation (N).",
)
resize_option = PURIFICATION(
    "--resize",
    type=click.Choice(RESIZE_MODES),
    help="Resize images to the backbone's size and back in this way. Without it other sizes are refused.",
)
backbone_option = MODEL(
    "-b",
    "--backbone",
    required=True,
    help='Backbone to purify with: a name ("cmap-defense backbones list"), a folder or a Hub id.',
)

model_options = together(
    backbone_option,
    MODEL(
        "-c",
        "--classifier",
        required=True,
        help='Classifier to defend: pkg.module:factory, file.py:factory, or "embedded".',
    ),
    MODEL(
        "--weights",
        type=PathType(dir_okay=False, exists=True),
        help="File with the classifier's state dict, of safetensors or torch.save.",
    ),
    MODEL(
        "--mean",
        type=_Channels(),
        help="Mean that the classifier's preprocessing subtracts, one number per channel. It needs --std.",
    ),
    MODEL(
        "--std",
        type=_Channels(),
        help="Standard deviation that the classifier's preprocessing divides by, such as 0.25,0.24,0.26.",
    ),
    latents_option,
    iterations_option,
    PURIFICATION(
        "--learning-rate",
        type=float,
        show_default="the backbone's",
        help="Learning rate of the latent optimisation.",
    ),
    PURIFICATION(
        "--vote",
        type=click.Choice(["label", "soft"]),
        default="label",
        show_default=True,
        help="Combine the predictions for the K purified images by their labels, or by their mean probabilities.",
    ),
    resize_option,
    RUNNING(
        "--max-parallel",
        type=click.IntRange(1),
        show_default="what fits into memory",
        help="Number of latents that are computed at the same time.",
    ),
    threads_option,
    device_option,
)
"""The defended classifier."""

data_options = together(
    DATA(
        "-d",
        "--data",
        required=True,
        help='Data set: "cifar10", "fashion-mnist", "embedded", an .npz file, or a folder of class folders.',
    ),
    DATA(
        "--split",
        type=click.Choice(["train", "test"]),
        default="test",
        show_default=True,
        help="Part of the data set.",
    ),
    DATA("--size", type=click.IntRange(1), help="Resize and crop the images of a folder to this many pixels."),
    DATA(
        "-n",
        "--n",
        "count",
        type=click.IntRange(1),
        show_default=f"{COUNT}, or all where there are fewer",
        help="Number of images to take from the data set.",
    ),
    DATA(
        "--order",
        type=click.Choice(["first", "last", "random"]),
        show_default="first; random for a folder, whose images come class by class",
        help='Which images to take. With --split train, "last" takes those that "train --hold-out" left out of data '
        "that are no folder.",
    ),
)
"""Which images."""

attack_options = together(
    ATTACKS(
        "--attacks",
        "suite",
        type=click.Choice([*ATTACK_SETS, "none"]),
        default="standard",
        show_default=True,
        help="Set of attacks to run.",
    ),
    ATTACKS("--only", multiple=True, metavar="NAME", help="Run this attack of the set alone. May be repeated."),
    ATTACKS(
        "--steps", type=click.IntRange(1), show_default="the set's", help="Number of steps of the attacks on the image."
    ),
    ATTACKS(
        "--eot",
        type=click.IntRange(1),
        show_default="the set's",
        help="Number of evaluations of the defence that a gradient is averaged over.",
    ),
    ATTACKS(
        "--norm",
        type=click.Choice(["linf", "l2"]),
        default="linf",
        show_default=True,
        help="Norm that bounds the perturbation.",
    ),
    ATTACKS(
        "--eps",
        type=Size(),
        default="8/255",
        show_default=True,
        help="Largest perturbation in that norm, for images in [0, 1].",
    ),
)
"""By which attacks."""

protocol_options = together(
    PREDICTIONS(
        "--runs",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Number of runs, with the seeds 0, 1 and so on.",
    ),
    PREDICTIONS(
        "--predictions",
        type=click.IntRange(1),
        default=PROTOCOL.predictions,
        show_default=True,
        help="Number of predictions with independent noise for each final image.",
    ),
    PREDICTIONS(
        "--reevaluations",
        type=click.IntRange(1),
        default=PROTOCOL.reevaluations,
        show_default=True,
        help="Number of further such predictions, on which nothing is selected.",
    ),
    PREDICTIONS(
        "--group",
        type=click.IntRange(1),
        default=PROTOCOL.group,
        show_default=True,
        help="Number of images that are attacked together.",
    ),
)
"""How often each image is attacked and predicted."""

check_options = together(
    CHECKS(
        "--sanity-images",
        type=click.IntRange(0),
        default=PROTOCOL.sanity_images,
        show_default=True,
        help="Number of images that the attacks are checked on. With 0 there are no checks and no headline.",
    ),
    CHECKS(
        "--gradient-samples",
        type=click.IntRange(2),
        default=PROTOCOL.gradient_samples,
        show_default=True,
        help="Number of gradients per image that the check of averaged gradients draws.",
    ),
    CHECKS(
        "--search-on-clean/--no-search-on-clean",
        default=PROTOCOL.search_on_clean,
        show_default=True,
        help="Predict clean images as often as the longest search does, to measure its selection effect.",
    ),
)
"""On what the attacks are checked."""
