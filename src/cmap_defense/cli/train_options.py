"""What the options of ``cmap-defense train`` mean: a network, an objective, a command line that says it all again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import click
import torch

from cmap_defense.backbones.karras import EDMDenoiser, KarrasModel
from cmap_defense.backbones.load import load_backbone
from cmap_defense.backbones.networks import PRESETS, Network
from cmap_defense.cli.commands.train import Pair
from cmap_defense.errors import WrongKindError
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.objectives import OBJECTIVES, Objective
from cmap_defense.training.run import source_of

__all__ = [
    "check_class_names",
    "check_levels",
    "network_of",
    "objective_of",
    "recorded_command",
    "teacher_of",
]

COMPACT = ("preset", "channels", "attention", "blocks", "patch")
"""Options that belong to the compact network."""

SAID_OTHERWISE = (*COMPACT, "halvings")
"""Options that stand in a recorded command as ``--set`` and ``--objective-set``."""

ELSEWHERE = (
    "out",
    "as_json",
    "device",
    "threads",
    "minutes",
    "checkpoint_part_mb",
    "micro_batch",
    "hold_images",
    "channels_last",
)
"""Options that say where a training runs and what it may take, and not what it is."""


def check_levels(options: Mapping[str, Any]) -> None:
    """Raises click.BadParameter for attention at a level that is not there, before any data are read."""
    levels = len(options["channels"] or PRESETS[options["preset"] or "small"]["channels"])
    unknown = [level for level in options["attention"] or () if level not in range(levels)]
    if unknown:
        raise click.BadParameter(f"there is no level {unknown[0]} of {levels}.", param_hint="--attention")


def check_class_names(model: KarrasModel | None, names: Sequence[str] | None, option: str) -> None:
    """Raises click.BadParameter where a model was told the data's classes in another order, or other classes."""
    record = None if model is None else model.record
    told = None if record is None else record.training.get("class_names")
    if told is None or names is None or list(told) == list(names):
        return
    raise click.BadParameter(
        f"its classes are {', '.join(map(str, told))}, those of the data {', '.join(names)}.", param_hint=option
    )


def network_of(options: Mapping[str, Any], image_shape: tuple[int, int, int], num_classes: int | None) -> Network:
    """The network that --network, --set and the compact network's own options describe."""
    name, changes = options["network"], _once(options["network_set"], "--set")
    if name == "compact":
        changes = _compact(options) | changes
    else:
        given = [option for option in COMPACT if options[option] is not None]
        if given:
            raise click.UsageError(f"--{given[0]} belongs to the compact network: use --set for those of {name}.")
    return Network.named(name, image_shape, changes, num_classes=num_classes)


def _compact(options: Mapping[str, Any]) -> dict[str, Any]:
    changes = dict(PRESETS[options["preset"] or "small"])
    given = {name: options[name] for name in ("channels", "blocks", "patch") if options[name] is not None}
    levels, flags = len(given.get("channels", changes["channels"])), changes["attention"]
    attended = options["attention"]
    if attended is None:
        attended = [level for level, flag in enumerate(flags) if flag]
    return changes | given | {"attention": tuple(level in attended for level in range(levels))}


def objective_of(options: Mapping[str, Any], teacher: EDMDenoiser | None) -> Objective:
    """The objective that --objective and --objective-set describe."""
    name, values = options["objective"], _once(options["objective_set"], "--objective-set")
    if options["halvings"] is not None:
        if name != "ect" or "halvings" in values:
            raise click.UsageError("--halvings is --objective-set halvings=..., of the objective ect.")
        values["halvings"] = options["halvings"]
    if teacher is not None:
        conditional = teacher.num_classes is not None
        values |= {"teacher": teacher.denoise, "teacher_source": source_of(teacher), "class_conditional": conditional}
    return OBJECTIVES[name].from_dict(values)


def teacher_of(options: Mapping[str, Any], device: torch.device) -> EDMDenoiser | None:
    """The denoiser that --teacher names, for the objective cd; None for the other objectives."""
    if (options["objective"] == "cd") != (options["teacher"] is not None):
        raise click.UsageError("--teacher names what --objective cd distils: they go together.")
    if options["teacher"] is None:
        return None
    try:
        teacher = load_backbone(options["teacher"], kind="denoiser")
    except WrongKindError as error:
        raise click.BadParameter(str(error), param_hint="--teacher") from error
    if teacher.num_classes is not None and not options["class_conditional"]:
        raise click.BadParameter("it is told the classes: add --class-conditional.", param_hint="--teacher")
    return teacher.to(device)


def recorded_command(
    parameters: Sequence[click.Parameter],
    options: Mapping[str, Any],
    config: TrainingConfig,
    network: Network,
    objective: Objective,
) -> str:
    """The command line of a training in full, without where it runs and writes.

    Args:
        parameters: of the command.
        options: their values.
        config: settings with the chosen length and precision.
        network: the network.
        objective: the objective.
    """
    values = dict(options) | dict.fromkeys((*SAID_OTHERWISE, *ELSEWHERE))
    values |= {"images": config.images, "precision": config.precision}
    values["network_set"] = tuple(network.changes.items())
    values["objective_set"] = tuple(objective.to_dict().items())
    words = ["cmap-defense train"]
    for parameter in parameters:
        value = values[parameter.name or ""]
        if value is None or value == "":
            continue
        if isinstance(parameter.type, Pair):
            for key, item in value:
                words += [parameter.opts[0], shlex.quote(f"{key}={json.dumps(item, separators=(',', ':'))}")]
        elif value is False:
            words += parameter.secondary_opts[:1]
        else:
            words.append(parameter.opts[0])
            if value is not True:
                text = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
                words.append(shlex.quote(text))
    return " ".join(words)


def _once(pairs: Sequence[tuple[str, Any]], option: str) -> dict[str, Any]:
    """Pairs as a mapping. Raises click.BadParameter where a key comes twice."""
    twice = [key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])]
    if twice:
        raise click.BadParameter(f"{twice[0]} is set twice.", param_hint=option)
    return dict(pairs)
