"""Options that commands share, and what makes things of them: a model, its images, its attacks, a protocol."""

from __future__ import annotations

import fractions
import os
from collections.abc import Callable, Mapping
from typing import Any

import click
import torch

from cmap_defense.attacks import Attack, ThreatModel, full_suite, paper_suite, standard_suite
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.models import EMBEDDED, imported_model
from cmap_defense.cli.output import checked_device
from cmap_defense.cli.paths import PathType
from cmap_defense.data import DATASETS, open_dataset
from cmap_defense.embedded import CLASS_NAMES, load_test_images
from cmap_defense.evaluation.protocol import Protocol, Subset
from cmap_defense.inputs import RESIZE_MODES
from cmap_defense.paths import expanded
from cmap_defense.settings import near_matches

__all__ = [
    "Size",
    "attack_options",
    "attacks_of",
    "attempt_options",
    "baselines_of",
    "check_options",
    "class_names_of",
    "data_of",
    "data_options",
    "model_of",
    "model_options",
    "protocol_of",
    "subset_of",
    "threat_of",
]

SUITES: Mapping[str, Any] = {"standard": standard_suite, "paper": paper_suite, "full": full_suite}
PROTOCOL = Protocol()


class Size(click.ParamType):
    """A number, or a fraction such as 8/255."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            size = float(fractions.Fraction(str(value)))
        except (ValueError, ZeroDivisionError):
            size = -1.0
        if size <= 0:
            self.fail(f"{value} is no size such as 0.05 or 8/255.", param, ctx)
        return size


class _Channels(click.ParamType):
    """Numbers with commas between them, one per channel."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value} is not one number per channel, such as 0.49,0.48,0.45.", param, ctx)


Decorator = Callable[[Any], Any]


def _together(*options: Decorator) -> Decorator:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_options = _together(
    click.option("-b", "--backbone", required=True, help="A name, a folder or a Hub id."),
    click.option(
        "-c",
        "--classifier",
        required=True,
        help='Where it is made: pkg.module:factory, file.py:factory, or "embedded".',
    ),
    click.option(
        "--weights",
        type=PathType(dir_okay=False, exists=True),
        help="Its state dict, of safetensors or torch.save.",
    ),
    click.option("--mean", type=_Channels(), help="That the classifier expects its images normalised with; see --std."),
    click.option("--std", type=_Channels(), help="One number per channel, such as 0.25,0.24,0.26."),
    click.option("--resize", type=click.Choice(RESIZE_MODES), help="Resize images to the backbone's size and back."),
    click.option("--latents", type=click.IntRange(1), help="K.  [default: the backbone's]"),
    click.option("--iterations", type=click.IntRange(1), help="N of the latent loop.  [default: the backbone's]"),
    click.option("--learning-rate", type=float, help="[default: the backbone's]"),
    click.option("--vote", type=click.Choice(["label", "soft"]), default="label", show_default=True),
    click.option("--max-parallel", type=click.IntRange(1), help="Latents at a time.  [default: what fits]"),
    click.option("--threads", type=click.IntRange(1), help="Of the CPU; belongs to the results."),
    click.option("--device", default="cpu", show_default=True, help="Where to run, such as cuda."),
)
"""The defended classifier."""

data_options = _together(
    click.option(
        "-d",
        "--data",
        required=True,
        help='"cifar10", "fashion-mnist", "embedded", an .npz file, or a folder of class folders.',
    ),
    click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True),
    click.option("--size", type=click.IntRange(1), help="Resize and crop the images of a folder to this many pixels."),
    click.option("-n", "--n", "count", type=click.IntRange(1), default=512, show_default=True, help="Images."),
    click.option(
        "--order",
        type=click.Choice(["first", "last", "random"]),
        help="last, with --split train: what train --hold-out leaves out of data that are no folder.  "
        "[default: first; random for a folder, whose images come class by class]",
    ),
)
"""Which images."""

attack_options = _together(
    click.option(
        "--attacks", "suite", type=click.Choice([*SUITES, "none"]), default="standard", show_default=True, help="A set."
    ),
    click.option("--only", multiple=True, metavar="NAME", help="This attack of the set; may be repeated."),
    click.option("--steps", type=click.IntRange(1), help="Of the attacks on the image.  [default: the set's]"),
    click.option("--eot", type=click.IntRange(1), help="Evaluations per gradient.  [default: the set's]"),
    click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True),
    click.option("--eps", type=Size(), default="8/255", show_default=True, help="Of images in [0, 1]."),
)
"""By which attacks."""

attempt_options = _together(
    click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="With seeds 0, 1, ..."),
    click.option("--answers", type=click.IntRange(1), default=PROTOCOL.answers, show_default=True, help="Per image."),
    click.option("--repurifications", type=click.IntRange(1), default=PROTOCOL.repurifications, show_default=True),
    click.option(
        "--group", type=click.IntRange(1), default=PROTOCOL.group, show_default=True, help="Images attacked together."
    ),
)
"""How often each image is attacked and asked about."""

check_options = _together(
    click.option(
        "--sanity-images",
        type=click.IntRange(0),
        default=PROTOCOL.sanity_images,
        show_default=True,
        help="For the checks of the attacks.",
    ),
    click.option("--gradient-samples", type=click.IntRange(2), default=PROTOCOL.gradient_samples, show_default=True),
    click.option(
        "--search-control/--no-search-control",
        default=True,
        show_default=True,
        help="Ask about clean images as often as a search does.",
    ),
)
"""On what the attacks are checked."""


def model_of(options: Mapping[str, Any]) -> PurifiedClassifier:
    """The model that :data:`model_options` describe, in eval mode; under torchrun on this rank's own GPU."""
    device = _device(options)
    classifier = imported_model(options["classifier"], options["weights"], device, "--classifier")
    if (options["mean"] is None) != (options["std"] is None):
        raise click.UsageError("--mean and --std go together.")
    model = PurifiedClassifier(
        classifier,
        options["backbone"],
        normalize=None if options["mean"] is None else (options["mean"], options["std"]),
        resize=options["resize"],
        vote=options["vote"],
        max_parallel=options["max_parallel"],
    ).to(device)
    names = {"n_latents": "latents", "iterations": "iterations", "learning_rate": "learning_rate"}
    changes = {setting: options[name] for setting, name in names.items() if options[name] is not None}
    changed = model.variant(settings=model.settings.replace(**changes)) if changes else model
    return changed.eval()


def data_of(options: Mapping[str, Any]) -> Any:
    """The data set that :data:`data_options` name."""
    if options["data"] == EMBEDDED:
        return load_test_images()
    return open_dataset(options["data"], options["split"], size=options["size"])


def class_names_of(options: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Those of the embedded images; None for a data set that knows its own."""
    return CLASS_NAMES if options["data"] == EMBEDDED else None


def subset_of(options: Mapping[str, Any]) -> Subset:
    """Which images of it."""
    source = options["data"]
    folder = source not in (EMBEDDED, *DATASETS) and expanded(source).is_dir()
    return Subset(count=options["count"], order=options["order"] or ("random" if folder else "first"))


def threat_of(options: Mapping[str, Any]) -> ThreatModel:
    """Norm and eps."""
    return ThreatModel(norm=options["norm"], eps=options["eps"])


def attacks_of(options: Mapping[str, Any]) -> dict[str, Attack]:
    """The attacks that :data:`attack_options` name, at the sizes asked for."""
    if options["suite"] == "none":
        return {}
    sizes = {name: options[name] for name in ("steps", "eot") if options[name] is not None}
    suite = SUITES[options["suite"]](threat_of(options), **sizes)
    for name in options["only"]:
        if name not in suite:
            raise click.BadParameter(f"there is no attack {name!r}.{near_matches(name, suite)}", param_hint="--only")
    return {name: attack for name, attack in suite.items() if not options["only"] or name in options["only"]}


def protocol_of(options: Mapping[str, Any]) -> Protocol:
    """What :data:`attempt_options` say, and :data:`check_options` where the command has them."""
    names = ("answers", "repurifications", "group", "search_control", "sanity_images", "gradient_samples")
    given = {name: options[name] for name in names if name in options}
    return Protocol(seeds=tuple(range(options["runs"])), **given)


def baselines_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Other models by name; they take images in [0, 1]."""
    found = {}
    for text in options["baseline"]:
        name, _, path = text.partition("=")
        if not name or not path:
            raise click.BadParameter(f"{text!r} is not NAME=PATH.", param_hint="--baseline")
        found[name] = imported_model(path, None, _device(options), "--baseline")
    return found


def _device(options: Mapping[str, Any]) -> torch.device:
    name = options["device"]
    own = os.environ.get("LOCAL_RANK")
    return checked_device(f"cuda:{own}" if name == "cuda" and own is not None else name)
