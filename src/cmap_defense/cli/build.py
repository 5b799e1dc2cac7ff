"""What options stand for: a model and others beside it, their images, attacks, a protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, nn

from cmap_defense.adaptation.run import recorded_target
from cmap_defense.attacks import Attack, ThreatModel
from cmap_defense.attacks.suites import SUITES
from cmap_defense.backbones.weights import read_state_dict, sha256_of
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.options import COUNT, EMBEDDED
from cmap_defense.common.paths import expanded
from cmap_defense.common.settings import Settings, near_matches
from cmap_defense.data import DATASETS
from cmap_defense.data.selection import labelled_data
from cmap_defense.data.sources import open_named
from cmap_defense.data.subset import Subset
from cmap_defense.embedded import CLASSIFIERS, load_classifier
from cmap_defense.errors import BackboneFileError, SettingsError, UnknownNameError
from cmap_defense.purifiers import CMAP, Purifier, from_texts
from cmap_defense.purifiers.choice import lacks_presets, loaded_with, recorded_settings
from cmap_defense.purifiers.names import name_of

PURIFIER_OPTIONS = ("n_latents", "iterations", "learning_rate")

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before the names in a state dict: DataParallel, torch.compile, Lightning."""

Options = Mapping[str, Any]

Printed = tuple[Any, list[str]] | None
"""What a command prints: with ``--json`` the first, else the lines; None for nothing."""

SettingsType = TypeVar("SettingsType", bound=Settings)


def settings_of(settings: type[SettingsType], options: Options, **others: Any) -> SettingsType:
    """Settings from the options of their fields; None keeps a default. Settings that do not fit are wrong usage."""
    names = [field.name for field in dataclasses.fields(settings)]
    given = {name: options[name] for name in names if options.get(name) is not None}
    with usage_errors():
        return settings.from_dict(given | others)


@contextlib.contextmanager
def usage_errors(remedy: str = "") -> Iterator[None]:
    """Settings that are refused inside are wrong usage; the remedy ends the message."""
    try:
        yield
    except (SettingsError, UnknownNameError) as error:
        raise click.UsageError(f"{error}{remedy}") from error


def device_of(options: Options) -> torch.device:
    """The device of ``--device``, under torchrun this rank's own GPU; wrong usage where it is not there."""
    name, own = options["device"], os.environ.get("LOCAL_RANK")
    try:
        device = torch.device(f"cuda:{own}" if name == "cuda" and own is not None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name}: {error}", param_hint="--device") from error
    return device


def model_of(options: Options) -> PurifiedClassifier:
    """The model that the model options describe, in eval mode."""
    return defended(classifier_of(options), options["backbone"], options)


def classifier_of(options: Options, *, trained: bool = False) -> Any:
    """The undefended classifier that the options describe; see ``imported_model``."""
    given = options["classifier"], options["weights"]
    return imported_model(*given, device_of(options), "--classifier", trained=trained)


def normalize_of(options: Options) -> Any:
    """``--mean`` and ``--std`` as the wrapper takes them."""
    if (options["mean"] is None) != (options["std"] is None):
        raise click.UsageError("--mean and --std go together: give both, or neither.")
    return None if options["mean"] is None else (options["mean"], options["std"])


def defended(classifier: Any, given: Any, options: Options) -> PurifiedClassifier:
    """A classifier behind the purifier of the options, in eval mode."""
    normalize = normalize_of(options)
    backbone, purifier = backbone_and_purifier(given, options)
    return PurifiedClassifier(
        classifier,
        backbone,
        purifier=purifier,
        normalize=normalize,
        resize=options["resize"],
        vote=options["vote"],
        max_parallel=options["max_parallel"],
    ).eval()


def cmap_model_of(options: Options, remedy: str = "") -> PurifiedClassifier:
    """The same for a command about CMAP alone; the remedy ends the message where it does not run on the backbone."""
    return model_of({**options, "purifier": "cmap", "remedy": remedy})


def backbone_and_purifier(given: Any, options: Options) -> tuple[nn.Module, Purifier]:
    """A backbone, or a pair of them, on its device, and the purifier of the options; without any the backbone's own.

    CMAP by name starts from the settings of CMAP in the backbone's record.
    """
    name, preset, texts = options["purifier"], options.get("purifier_preset"), _purifier_texts(options)
    keys = {text.partition("=")[0].strip() for text in texts}
    if preset and (texts or name is not None):
        raise click.UsageError("--purifier-preset names a purifier with its settings: leave other options of it out.")
    if name is None and not preset and lacks_presets(given):  # so that mistakes are found before anything is fetched
        name = "cmap"
    named = {**options, "purifier": name}
    wanted = preset if preset or name is None else purifier_of(named)
    remedy = {"remedy": options["remedy"]} if "remedy" in options else {}
    backbone, purifier = loaded_with(given, wanted, device_of(options), **remedy)
    if name == "cmap" and "level" not in keys:  # a record's settings do not fit a level
        purifier = purifier_of(named, CMAP(recorded_settings(purifier.member(backbone))))
    elif name is None and texts:
        named["purifier"] = default = name_of(purifier)
        remedy = f" {default} is what goes with the backbone: --purifier takes another"
        remedy += "." if default == "cmap" else ", such as cmap."
        purifier = purifier_of(named, purifier, "" if keys <= purifier.to_dict().keys() else remedy)
        with usage_errors():
            purifier.check(backbone)
    return backbone, purifier


def purifier_of(options: Options, start: Purifier | None = None, remedy: str = "") -> Purifier:
    """The purifier that the options name, as changes to another one of its class; see ``usage_errors``."""
    with usage_errors(remedy):
        return from_texts(options["purifier"], _purifier_texts(options), start)


def _purifier_texts(options: Options) -> list[str]:
    short = [f"{name}={options[name]}" for name in PURIFIER_OPTIONS if options.get(name) is not None]
    return [*options.get("purifier_set", ()), *short]


def was_given(name: str) -> bool:
    """Whether the user gave an option of the running command, rather than leaving it at its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)


def refuse(name: str, why: str) -> None:
    """Wrong usage where the user gave an option that would have no effect."""
    if was_given(name):
        parameters = {parameter.name: parameter for parameter in click.get_current_context().command.params}
        raise click.BadParameter(why, param_hint=max(parameters[name].opts, key=len))


def data_of(options: Options) -> Any:
    """The data set that the data options name."""
    if options["data"] != EMBEDDED:
        return open_named(options["data"], options["split"], options["size"], None, (*DATASETS, EMBEDDED))
    if options["split"] != "test":
        raise click.BadParameter(
            "the embedded images are all of the test set: leave the option out, or give --data fashion-mnist.",
            param_hint="--split",
        )
    if options.get("size") is not None:
        raise click.BadParameter("the embedded images have one size: leave the option out.", param_hint="--size")
    return labelled_data(EMBEDDED)


def subset_of(options: Options, data: Any) -> Subset:
    """Which images of a data set; without a number as many as most commands take, or all where there are fewer."""
    source = options["data"]
    folder = source not in (EMBEDDED, *DATASETS) and expanded(source).is_dir()
    count = options["count"] or max(1, min(COUNT, len(data)))
    return Subset(count=count, order=options["order"] or ("random" if folder else "first"))


def threat_of(options: Options, *, zero: bool = False) -> ThreatModel:
    """Norm and eps, linf where the command has no other norm; wrong usage for a size of 0, unless that may be."""
    threat = settings_of(ThreatModel, options)
    if not zero and threat.eps == 0:
        instead = ", or --attacks none for no attack" if "attacks" in options else ""
        raise click.BadParameter(f"an attack of size 0 changes nothing: give 8/255{instead}.", param_hint="--eps")
    return threat


def attacks_of(options: Options) -> dict[str, Attack]:
    """The attacks that the attack options name."""
    none = options["attacks"] == "none"
    threat = threat_of(options, zero=none)
    if none:
        for name in ("only", "steps", "eot"):
            refuse(name, "--attacks none makes no attack: leave one of them out.")
        return {}
    sizes = {name: options[name] for name in ("steps", "eot") if options[name] is not None}
    suite = SUITES[options["attacks"]](threat, **sizes)
    for name in options["only"]:
        if name not in suite:
            known = {given: set(made(threat)) for given, made in SUITES.items()}
            others = " or ".join(f"--attacks {given}" for given, names in known.items() if name in names)
            missing = f"there is no attack {name!r}.{near_matches(name, set().union(*known.values()))}"
            elsewhere = f"{name!r} is not in the set {options['attacks']!r}: give {others} with it."
            raise click.BadParameter(elsewhere if others else missing, param_hint="--only")
    return {name: attack for name, attack in suite.items() if not options["only"] or name in options["only"]}


def imported_models(given: Iterable[str], options: Options, option: str, *taken: str) -> dict[str, Any]:
    """Models of texts ``NAME=PATH[@WEIGHTS]`` by name; they take images in [0, 1] and have no name that is taken."""
    found: dict[str, Any] = {}
    for text in given:
        name, _, rest = text.partition("=")
        path, _, file = rest.partition("@")
        weights = expanded(file) if file else None
        if not name or not path:
            raise click.BadParameter(f"{text!r} is not NAME=PATH or NAME=PATH@WEIGHTS.", param_hint=option)
        if name in found or name in taken:
            raise click.BadParameter(f"two models are called {name!r}: rename one.", param_hint=option)
        if weights is not None and not weights.is_file():
            raise click.BadParameter(f"there is no file {weights}.", param_hint=option)
        found[name] = imported_model(path, weights, device_of(options), option)
    return found


def imported_model(
    path: str, weights: Path | None, device: torch.device, option: str, *, trained: bool = False
) -> Callable[[Tensor], Tensor]:
    """The model at an import path, in eval mode, on a device; errors name the option that it was given by.

    The path is ``package.module:name`` or ``file.py:name``, where name is a model or makes one without arguments,
    "embedded", or the name of an embedded classifier. The weights are a state dict, or an entry of what ``torch.save``
    wrote, of which nothing is executed. They require a gradient only where the model is to be trained.
    """
    path = CLASSIFIERS[0] if path == EMBEDDED else path
    model = load_classifier(path) if path in CLASSIFIERS else _imported(path, option)
    if weights is not None:
        _load(model, weights, "--weights" if option == "--classifier" else option)
    if isinstance(model, nn.Module):
        model = model.to(device).eval()
        if not trained:
            model.requires_grad_(False)
    return model


def _imported(path: str, option: str) -> Any:
    """The model that an import path names or makes; wrong usage, in one sentence, where the user's code raises."""
    module_name, _, name = path.rpartition(":")
    if not module_name or not name:
        remedy = near_matches(path, [EMBEDDED, *CLASSIFIERS]).replace("Known:", "Or give")
        raise click.BadParameter(
            f"{path!r} is no import path such as my_models:resnet or my_models.py:resnet.{remedy}", param_hint=option
        )
    try:
        found = functools.reduce(getattr, name.split("."), _module(module_name))
        if not isinstance(found, nn.Module) and callable(found):
            with contextlib.suppress(ValueError):  # a function in C may have no signature
                inspect.signature(found).bind()
            found = found()
    except (Exception, SystemExit) as error:
        what = "cannot be imported" if isinstance(error, ImportError) else f"raised {type(error).__name__}"
        raise click.BadParameter(
            f"{path} {what}: {error}. Name a model, or a function without arguments that makes it.", param_hint=option
        ) from error
    if not callable(found):
        raise click.BadParameter(
            f"{path} gives {type(found).__name__}, which is no model: name a model, or a function that makes it.",
            param_hint=option,
        )
    return found


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
        return importlib.import_module(name)
    file = expanded(name)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"there is no file {name}")
    beside = str(file.absolute().parent)
    if beside not in sys.path:
        sys.path.insert(0, beside)  # for what it imports from its own folder
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load(model: Any, weights: Path, option: str) -> None:
    if not isinstance(model, nn.Module):
        raise click.BadParameter("there is no module to load weights into.", param_hint=option)
    wanted = model.state_dict()
    try:
        state = _without_prefixes(read_state_dict(weights), list(wanted))
    except BackboneFileError as error:
        message = str(error)
        if "state_dict()" not in message and weights.suffix != ".safetensors":
            message += " Save the state dict alone: torch.save(model.state_dict(), path)."
        raise click.BadParameter(message, param_hint=option) from error
    differences = {
        "does not hold": [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")],
        "holds besides": [name for name in state if name not in wanted],
        "has other shapes for": [n for n in wanted if n in state and state[n].shape != wanted[n].shape],
    }
    listed = "; ".join(f"it {what} {', '.join(names[:3])}" for what, names in differences.items() if names)
    if listed:
        raise click.BadParameter(f"{weights} is not of this model: {listed}.", param_hint=option)
    model.load_state_dict(state, strict=False)  # counts of batches may be missing, which eval mode does not use
    vars(model).pop("adapted_to", None)  # of the weights before these
    with contextlib.suppress(BackboneFileError):
        checksum, target = recorded_target(weights.parent)
        if checksum == sha256_of(weights):
            vars(model)["adapted_to"] = target


def _without_prefixes(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """A state dict without the prefixes of wrappers, where a model with these names has none."""
    while state:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None or any(name.startswith(prefix) for name in names):
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
