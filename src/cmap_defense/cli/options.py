"""Options that several commands have, most of them generated from settings; without torch, as help must be quick."""

from __future__ import annotations

import dataclasses
import fractions
import json
import os
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cmap_defense.cli.command import Decorator, decorators, in_group
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.common.paths import expanded
from cmap_defense.common.settings import Settings, in_255ths, near_matches
from cmap_defense.data.subset import Subset
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.threat import ThreatModel

MODEL = in_group("Model")
DATA = in_group("Data")
PURIFICATION = in_group("Purification")
ATTACKS = in_group("Attacks")
RUNNING = in_group("Running")
OUTPUT = in_group("Output")

EMBEDDED = "embedded"
"""The name of what ships with the package."""

COUNT = 512
"""Images that commands take from a data set where no number is given."""

ATTACK_SETS = ("standard", "paper", "exact", "full")
DATASETS = ("cifar10", "fashion-mnist")
PURIFIERS = ("cmap", "one-step", "diffpure", "gdmp", "adp", "gnsp", "likelihood-maximisation", "chain", "identity")
PRESETS = ("paper", "balanced", "fast")
RESIZE_MODES = ("bilinear", "bicubic", "area", "nearest-exact")
STUDIES = ("beta", "eps", "latent-weight", "latents", "ssim-weight", "surrogate", "trajectory", "vote")
NETWORKS = ("compact", "ncsnpp", "imagenet64")
NETWORK_PRESETS = ("small", "cifar10")
OBJECTIVES = ("edm", "ct", "ict", "ect", "cd")


class Choice(click.Choice[str]):
    """One of several words; a mistyped one is an error that names those that are near."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return f"there is no {value!r}.{near_matches(str(value), self.choices)}"


class Number(click.FloatRange):
    """A number, or a fraction such as 8/255, within bounds."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(fractions.Fraction(str(value).strip()))
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value} is not a number: write for instance 0.05 or 8/255.", param, ctx)
        return super().convert(number, param, ctx)


class Numbers(click.ParamType[tuple[Any, ...]]):
    """Numbers with commas between them, all of one type; "none" for none."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind, self.name = kind, "integers" if kind is int else "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        if value in ("", "none"):
            return ()
        try:
            return tuple(map(self._number, value.split(",")))
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value} is not a list of {self.name} with commas between them, such as 1,2,3.", param, ctx)

    def _number(self, text: str) -> float:
        return self.kind(fractions.Fraction(text.strip()) if self.kind is float and "/" in text else text)


class Pair(click.ParamType[tuple[str, Any]]):
    """``KEY=VALUE``, the value in JSON, numbers with commas between them, or else text as it is."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not KEY=VALUE, such as level=0.4.", param, ctx)
        return key, _value(text)


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(f"[{text.removesuffix(',')}]" if "," in text and text[:1] not in '[{"' else text)
    except ValueError:
        return text


class PathType(click.Path):
    """A path; a leading ``~`` is the home folder, also where the shell leaves it as it is (``--out=~/runs``)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        try:
            return super().convert(expanded(value), param, ctx)
        except SettingsError as error:
            self.fail(str(error), param, ctx)


def options_of(
    settings: type[Settings],
    group: str,
    *fields: str,
    short: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    unset: str | Mapping[str, str] | None = None,
) -> Decorator:
    """The options of a settings class, all or some of its fields: name, default, range and help are those of the field.

    ``group`` is the heading of those without one of their own. ``short`` has further names by field; one with two
    hyphens takes the place of the field's. ``defaults`` has other defaults by field. ``unset`` says, for all fields or
    by field, what is taken for an option that is not given, such as "the backbone's"; it is None then.
    """
    known = {field.name: field for field in dataclasses.fields(settings) if field.metadata.get("help")}
    hints = typing.get_type_hints(settings)
    made = []
    for name in fields or known:
        field, flag = known[name], "--" + name.replace("_", "-")
        members = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        kind = next((kind for kind in members if kind is not type(None)), str)
        other = (short or {}).get(name, "")
        names = [other, name] if other.startswith("--") else [*filter(None, [other]), flag, name]
        default = (defaults or {}).get(name, field.default)
        if kind is bool and default is not False:
            names[-2] += f"/--no-{flag[2:]}"
        shown = unset.get(name) if isinstance(unset, Mapping) else unset
        if shown is not None:
            default = None
        elif default is None:
            shown = field.metadata.get("default_help")
        elif isinstance(default, tuple):
            default = ",".join(map(str, default))
        elif kind is float:
            default = in_255ths(default) or f"{default:g}"
        unlisted = {"unset": shown, "is_flag": kind is bool, "default": default}
        group_of = in_group(field.metadata.get("group", group))
        made.append(group_of(*names, field.metadata["help"], type=_parameter_type(kind, field.metadata), **unlisted))
    return decorators(*made)


def _parameter_type(kind: Any, metadata: Mapping[str, Any]) -> click.ParamType[Any]:
    minimum, above, maximum, below = (metadata.get(bound) for bound in ("minimum", "above", "maximum", "below"))
    if kind is bool:
        return click.BOOL
    if kind is int:
        return click.IntRange(minimum, maximum if below is None else below - 1)
    if kind is float:
        least, most = minimum if above is None else above, maximum if below is None else below
        return Number(least, most, min_open=above is not None, max_open=below is not None)
    if typing.get_origin(kind) is tuple:
        return Numbers(typing.get_args(kind)[0])
    return Choice(metadata["choices"]) if "choices" in metadata else click.STRING


def command_text(command: str, parameters: Sequence[click.Parameter], values: Mapping[str, Any]) -> str:
    """A command line with options of these values; those that are missing, None or empty are left out."""
    words = ["cmap-defense", command]
    for option in parameters:
        value = values.get(option.name or "")
        if value is None or value == "":
            continue
        flag = max(option.opts, key=len)
        several = option.multiple and not isinstance(value, str)  # pyright: ignore[reportAttributeAccessIssue]
        for single in value if several else [value]:
            if single is True or single is False:
                words += [flag] if single else option.secondary_opts[:1]
            elif isinstance(option.type, Pair):
                words += [flag, f"{single[0]}={json.dumps(single[1], separators=(',', ':'))}"]
            else:
                words += [flag, ",".join(map(str, single)) or "none" if isinstance(single, tuple) else str(single)]
    return shlex.join(words)


def writable_folder(context: click.Context, parameter: click.Parameter, folder: Path) -> Path:
    """``folder``, refused before any work is done when nothing can be written there."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise click.BadParameter(f"{folder} cannot be written to: name another folder.", context, parameter)
    return folder


def out_option(default: str | None = None) -> Decorator:
    """``-o/--out DIR``: where a command writes; required when it has no default."""
    kind: dict[str, Any] = {"type": PathType(file_okay=False), "callback": writable_folder}
    text = "Folder to write to. It is made when it is not there."
    kind |= {"required": True} if default is None else {"default": default}  # click takes default=None as given
    return OUTPUT("-o", "--out", text, **kind)


def seed_option(about: str) -> Decorator:
    """``--seed``, with a sentence about what it decides."""
    return RUNNING("--seed", about, type=click.IntRange(0, 2**32 - 1), default=0)


def record_options(name: str | None, shown: bool | str = True) -> Decorator:
    """What is written about a backbone; ``shown`` is the name's default in the help."""
    record = in_group("Record and weights")
    return decorators(
        record("--name", "Name of the backbone in its record.", default=name, show_default=shown),
        record("--description", "Description of the backbone in its record.", default=""),
        record("--licence", "Licence of the weights in the record.", default=""),
    )


def data_option(about: str) -> Decorator:
    """``-d/--data``, with a sentence about what it may be."""
    return DATA("-d", "--data", about, required=True)


def pgd_options(default: float | None = None) -> Decorator:
    """The attack on the undefended classifier: its eps, with this default where there is one, and with it its steps."""
    defaults = {} if default is None else {"eps": default}
    eps = options_of(ThreatModel, "PGD (linf) on the undefended classifier", "eps", defaults=defaults)
    steps = in_group("PGD (linf) on the undefended classifier")("--steps", "Number of PGD steps.", least=1, default=20)
    return decorators(eps, steps) if default is not None else eps


threads = RUNNING(
    "--threads",
    "Threads of the CPU to compute with. Rounding, and so the results, depend on their number.",
    least=1,
    unset="torch's choice",
)
device = RUNNING("--device", "Device to compute on, such as cuda.", default="cpu")
dry_run = RUNNING("--dry-run", "Print what it would cost, and stop.", is_flag=True)
size = DATA("--size", "Resize and crop the images of a folder to this many pixels.", least=1)
resize = PURIFICATION(
    "--resize",
    "Resize images to the backbone's size and back in this way. Without it other sizes are refused.",
    type=Choice(RESIZE_MODES),
)


def one_or_two(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> str | tuple[str, ...]:
    """The one backbone that was given, or two for a pair; more are refused."""
    if len(given) > 2:
        raise click.BadParameter("give one backbone, or two of different kinds.", context, parameter)
    return given[0] if len(given) == 1 else given


backbone = MODEL(
    "-b",
    "--backbone",
    'Backbone to purify with: a name ("cmap-defense backbones list"), a folder or a Hub id. Twice for a consistency '
    "model and a denoiser; each purifier takes the one that it needs.",
    multiple=True,
    required=True,
    callback=one_or_two,
)
certified = OUTPUT(
    "--certified",
    "Folder of cmap-defense certify, whose certified accuracy the report also shows.",
    type=PathType(exists=True, file_okay=False),
)


def purifier_option(*names: str, **default: str) -> Decorator:
    """What purifies, by name, one of all where no names are given; its default, or what the help says for none."""
    return PURIFICATION("--purifier", "Method to purify by.", type=Choice(names or PURIFIERS), **default)


def purifier_set(example: str) -> Decorator:
    """The settings of what purifies."""
    return PURIFICATION(
        "--purifier-set",
        f"Set one of the purifier's settings to this value, such as {example}, or take a paper's constants, such as "
        "preset=cifar10-linf. May be repeated.",
        metavar="KEY=VALUE",
        multiple=True,
    )


def short_settings(unset: str) -> Decorator:
    """Some of them as options of their own; what the help says where one is not given."""
    return options_of(CMAPSettings, "Purification", "n_latents", "iterations", "learning_rate", unset=unset)


CHAINED = 't=75, or "purifiers=diffpure t=60, cmap level=0.5" of a chain'
"""Settings of a purifier, for the help."""

DEFAULT_PURIFIER = "what the backbone's record names, or else cmap"

purifier = decorators(
    purifier_option(unset=DEFAULT_PURIFIER),
    PURIFICATION(
        "--purifier-preset",
        "Use the purifier of this name in the backbone's record, in place of the other options of the purifier.",
        type=Choice(PRESETS),
    ),
    purifier_set(CHAINED),
    short_settings("the purifier's"),
)
"""What purifies."""

classifier = decorators(
    MODEL(
        "-c",
        "--classifier",
        'Classifier to defend: package.module:factory, file.py:factory, or an embedded one such as "embedded".',
        required=True,
    ),
    MODEL(
        "--weights",
        "File with the classifier's state dict, of safetensors or torch.save.",
        type=PathType(dir_okay=False, exists=True),
    ),
    MODEL(
        "--mean",
        "Mean that the classifier's preprocessing subtracts, one number per channel. It needs --std.",
        type=Numbers(float),
    ),
    MODEL(
        "--std",
        "Standard deviation that the classifier's preprocessing divides by, such as 0.25,0.24,0.26.",
        type=Numbers(float),
    ),
)
"""The undefended classifier."""

wrapper = decorators(
    PURIFICATION(
        "--vote",
        "Combine the predictions for the K purified images by their labels, or by their mean probabilities.",
        type=Choice(["label", "soft"]),
        default="label",
    ),
    resize,
    RUNNING(
        "--max-parallel",
        "Number of latents that are computed at the same time.",
        least=1,
        unset="what fits into memory",
    ),
    threads,
    device,
)
"""How a classifier is defended, whatever purifies."""

model = decorators(backbone, classifier, purifier, wrapper)
"""The defended classifier."""

cmap_model = decorators(backbone, classifier, purifier_set("level=1"), short_settings("the backbone's"), wrapper)
"""The classifier behind CMAP, for commands about it alone."""

data = decorators(
    data_option('Data set: "cifar10", "fashion-mnist", "embedded", an .npz file, or a folder of class folders.'),
    DATA("--split", "Part of the data set.", type=Choice(["train", "test"]), default="test"),
    size,
    options_of(
        Subset,
        "Data",
        "count",
        "order",
        short={"count": "-n"},
        unset={
            "count": f"{COUNT}, or all where there are fewer",
            "order": "first; random for a folder, whose images come class by class",
        },
    ),
)
"""Which images."""

attacks = decorators(
    ATTACKS("--attacks", "Set of attacks to run.", type=Choice([*ATTACK_SETS, "none"]), default="standard"),
    ATTACKS("--only", "Run only this attack of the set. May be repeated.", multiple=True, metavar="NAME"),
    ATTACKS("--steps", "Number of steps of the attacks on the image.", least=1, unset="the set's"),
    ATTACKS(
        "--eot", "Number of evaluations of the defence that a gradient is averaged over.", least=1, unset="the set's"
    ),
    options_of(ThreatModel, "Attacks"),
)
"""By which attacks."""

protocol, checks = (
    options_of(
        Protocol,
        "Predictions and runs",
        *(field.name for field in dataclasses.fields(Protocol) if ("group" in field.metadata) == grouped),
    )
    for grouped in (False, True)
)
"""How often each image is attacked and predicted, and on what the attacks are checked."""
