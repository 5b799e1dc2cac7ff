"""What the options that commands share stand for: a model, its images, its attacks, a protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click
import torch

from cmap_defense.attacks import Attack, ThreatModel, full_suite, paper_suite, standard_suite
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.choices import COUNT, EMBEDDED
from cmap_defense.cli.models import imported_model
from cmap_defense.cli.output import checked_device
from cmap_defense.data import DATASETS, open_dataset
from cmap_defense.data.subset import Subset
from cmap_defense.embedded import CLASS_NAMES, load_test_images
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.paths import expanded
from cmap_defense.settings import near_matches

__all__ = [
    "attacks_of",
    "baselines_of",
    "class_names_of",
    "data_of",
    "model_of",
    "protocol_of",
    "subset_of",
    "threat_of",
]

SUITES: Mapping[str, Any] = {"standard": standard_suite, "paper": paper_suite, "full": full_suite}


def model_of(options: Mapping[str, Any]) -> PurifiedClassifier:
    """The model that the model options describe, in eval mode; under torchrun on this rank's own GPU."""
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
    """The data set that the data options name."""
    if options["data"] == EMBEDDED:
        if options["split"] != "test":
            raise click.BadParameter(
                "the embedded images are all of the test set: leave the option out, or give --data fashion-mnist.",
                param_hint="--split",
            )
        return load_test_images()
    return open_dataset(options["data"], options["split"], size=options["size"])


def class_names_of(options: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Those of the embedded images; None for a data set that knows its own."""
    return CLASS_NAMES if options["data"] == EMBEDDED else None


def subset_of(options: Mapping[str, Any], data: Any) -> Subset:
    """Which images of a data set; without a number, so many as most commands take, or all where there are fewer."""
    total = len(data[0] if isinstance(data, tuple) else data)
    count = options["count"] or max(1, min(COUNT, total))
    source = options["data"]
    folder = source not in (EMBEDDED, *DATASETS) and expanded(source).is_dir()
    return Subset(count=count, order=options["order"] or ("random" if folder else "first"))


def threat_of(options: Mapping[str, Any]) -> ThreatModel:
    """Norm and eps. Raises click's error, which names the option, where eps is none for the norm."""
    try:
        return ThreatModel(norm=options["norm"], eps=options["eps"])
    except SettingsError as error:
        raise click.BadParameter(str(error), param_hint="--eps") from error


def attacks_of(options: Mapping[str, Any]) -> dict[str, Attack]:
    """The attacks that the attack options name, at the sizes asked for."""
    threat = threat_of(options)
    if options["suite"] == "none":
        return {}
    sizes = {name: options[name] for name in ("steps", "eot") if options[name] is not None}
    suite = SUITES[options["suite"]](threat, **sizes)
    for name in options["only"]:
        if name not in suite:
            raise click.BadParameter(f"there is no attack {name!r}.{near_matches(name, suite)}", param_hint="--only")
    return {name: attack for name, attack in suite.items() if not options["only"] or name in options["only"]}


def protocol_of(options: Mapping[str, Any]) -> Protocol:
    """What the protocol options say, and the check options where the command has them."""
    names = ("predictions", "reevaluations", "group", "search_on_clean", "sanity_images", "gradient_samples")
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
