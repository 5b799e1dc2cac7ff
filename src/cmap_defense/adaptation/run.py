"""Fine-tune a copy of a classifier on what a purifier makes of training images."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cmap_defense.adaptation.config import AdaptationConfig
from cmap_defense.adaptation.learner import AdaptationLearner
from cmap_defense.backbones.weights import check_sha256, read_safetensors, sha256_of, write_safetensors
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.classifier.cautions import adapted_to
from cmap_defense.classifier.speed import undefended_logits
from cmap_defense.common.describe import describe, describe_module
from cmap_defense.common.files import locked, tensor_checksum, write_json, written_whole
from cmap_defense.common.modules import evaluating, weights_of
from cmap_defense.common.paths import expanded
from cmap_defense.common.progress import OnProgress
from cmap_defense.common.ranks import ranks
from cmap_defense.common.settings import near_matches
from cmap_defense.data import LabelledImages
from cmap_defense.data.selection import SelectedImages, labelled_data
from cmap_defense.data.subset import Subset
from cmap_defense.errors import (
    BackboneFileError,
    CheckpointError,
    ClassifierError,
    DataError,
    InputTypeError,
    OptionError,
    SettingsError,
)
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers import OneStep, Purifier
from cmap_defense.threat import ThreatModel
from cmap_defense.training.loop import TrainState, countdown, train
from cmap_defense.training.plan import settled

WRAPPER = ("normalize", "inputs", "resize", "vote", "class_labels", "max_parallel", "out_of_range")
"""Options of ``PurifiedClassifier`` that ``adapt`` takes too."""

RECORD_FILE, WEIGHTS_FILE = "adaptation.json", "classifier.safetensors"

FREE = ("max_parallel",)
"""Options of ``PurifiedClassifier`` that may change when an adaptation is continued."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapted:
    """The result of ``adapt``.

    Attributes:
        classifier: the adapted copy, in eval mode; its attribute ``adapted_to`` says to what.
        record: what ``adaptation.json`` holds: purifier, backbone, threat model, settings, scores on held-out images.
        finished: whether the adaptation reached its end; otherwise the same call continues it.
    """

    classifier: nn.Module
    record: Mapping[str, Any]
    finished: bool

    def __repr__(self) -> str:
        scores = [round(score, 4) for score in self.record["held_out_scores"]]
        listed = f"images_seen={self.record['images_seen']}, held_out_scores={scores}, finished={self.finished}"
        return f"Adapted({type(self.classifier).__name__}, {listed})"


def adapt(
    classifier: nn.Module,
    backbone: Any,
    purifier: Purifier | None,
    data: Any,
    *,
    out: str | Path = "runs/adapted",
    adversarial: bool = False,
    threat: ThreatModel | None = None,
    held_out: Any = None,
    config: AdaptationConfig | None = None,
    progress: OnProgress = None,
    on_step: Callable[[TrainState], None] | None = None,
    **options: Any,
) -> Adapted:
    """Fine-tune a copy of ``classifier`` on purified training images, and write it to ``out``.

    Each image gets fresh noise whenever it is seen. With ``adversarial`` the images are attacked first, through the
    exact gradient of the purifier, ``Unrolled()`` (Madry et al. 2018, arXiv 1706.06083, behind a purifier). The loss
    is then ``clean_weight`` times that of clean images and the rest times that of attacked ones; their balance is the
    subject of TRADES (Zhang et al. 2019, arXiv 1901.08573). With ``Identity()`` it is plain adversarial training.

    Killed or stopped by ``config.minutes``, the same call continues from the last checkpoint in ``out``, and ends with
    the same weights. Under torchrun every process calls this.

    Args:
        classifier: a module from images [M, C, H, W] to logits [M, classes]. It is never changed. Parameters that
            require no gradient stay as they are.
        backbone: as ``PurifiedClassifier`` takes it; a module is moved to ``config.device``.
        purifier: what purifies; None for ``OneStep(n_latents=1)``, whose gradient is one network pass. Versions are
            averaged in the loss, and one is enough.
        data: training images, read into memory as 8-bit images: a pair of images [N, C, H, W] in [0, 1] and labels
            int64 [N], a ``Dataset``, what ``load_dataset`` returns, or a text, of which it loads the split "train".
        out: the folder of this adaptation alone: ``classifier.safetensors``, ``adaptation.json``, ``log.jsonl`` and
            checkpoints.
        adversarial: attack the training images.
        threat: of the attack, with ``adversarial`` alone; None for linf with 8/255.
        held_out: images that are not trained on, as ``data`` but not a text. The weights that are best on them are the
            result; None for the last weights.
        config: settings; None for the defaults. ``compile``, ``channels_last`` and ``hold_images`` have no effect here.
        progress: True for a bar on standard error, or a function of (done, total): steps.
        on_step: called after every step.
        options: of ``PurifiedClassifier``, such as ``normalize=(mean, std)``; not ``gradient``.

    Raises:
        ClassifierError: the classifier is no module, or purifies already.
        DataError, InputTypeError, InputValueError: images or labels do not fit.
        OptionError: there is no such option.
        SettingsError: an option is out of its range, or nothing can be trained.
        CheckpointError: the folder belongs to an adaptation with other settings, or another one is writing to it.
        TrainingError: the loss is infinite or no number.
    """
    if not isinstance(classifier, nn.Module):
        raise ClassifierError(
            f"Only an nn.Module can be adapted, but the classifier is a {type(classifier).__name__}: give the module."
        )
    if isinstance(classifier, PurifiedClassifier):
        raise ClassifierError("This classifier purifies already: give the one inside it, model.classifier.")
    _check_options(options)
    config, folder = config or AdaptationConfig(), expanded(out)
    attack = {name: getattr(AdaptationConfig(), name) for name in ("attack_steps", "attack_step_size", "clean_weight")}
    if not adversarial and (threat is not None or any(getattr(config, name) != attack[name] for name in attack)):
        raise SettingsError(
            "A threat model and settings of the attack are given, but nothing is attacked: give adversarial=True "
            "(--adversarial), or leave them out."
        )
    seconds_left = None if config.minutes is None else countdown(config.minutes)
    threat = (threat or ThreatModel()) if adversarial else None
    model = copy.deepcopy(classifier).to(config.device)
    vars(model).pop("adapted_to", None)  # of an adaptation before this one
    # The training images are in [0, 1], whatever the classifier is used with later.
    unit: dict[str, Any] = options | {"inputs": "unit", "gradient": Unrolled()}
    purified = PurifiedClassifier(model, backbone, purifier=purifier or OneStep(n_latents=1), **unit).to(config.device)
    if isinstance(held_out, (str, os.PathLike)):
        raise InputTypeError(
            f"held_out={os.fspath(held_out)!r} names training and test images, and held-out ones are neither: take "
            'images = load_dataset(..., "train"), and give data=images[:-5_000], held_out=images[-5_000:].'
        )
    if isinstance(data, str) and data == "embedded":
        raise DataError('The embedded images are test images: give training images, such as data="fashion-mnist".')
    training, kept_back = _labelled(data, purified), None if held_out is None else _labelled(held_out, purified)
    target = adapted_to(purified.backbone, purified.purifier)
    parts: dict[str, Any] = {
        "classifier": describe_module(classifier),
        "trained_weights": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        **target,
        "backbone_weights": describe_module(purified.purifier.member(purified.backbone))["weights"],
        "versions": purified.purifier.n_latents,
        "options": {
            name: describe(option) for name, option in options.items() if name not in FREE and option is not None
        },
        "threat": None if threat is None else threat.to_dict(),
        "data": _fingerprint(training),
        "held_out": None if kept_back is None else _fingerprint(kept_back),
    }
    with ranks() as team, locked(folder, "training", CheckpointError, team):

        def made(config: AdaptationConfig) -> AdaptationLearner:
            return AdaptationLearner(purified, training, kept_back, threat, config, team)

        config = settled(config, folder, parts, team, seconds_left, made, AdaptationLearner.evaluate)
        learner = made(config)
        step = train(
            learner,
            folder,
            parts=parts,
            seconds_left=seconds_left,
            on_step=on_step,
            ended=lambda: learner.exhausted,
            progress=progress,
        )
        finished = step >= config.steps or learner.exhausted
        model.load_state_dict(learner.best if learner.scores else learner.averaged())
        model.eval()
        record = {
            "format": 1,
            **parts,
            "adversarial": adversarial,
            "train": config.reproducible(),
            "images_seen": step * config.batch_size,
            "held_out_scores": learner.scores,
        }
        team.by_first(functools.partial(_write, folder, model, record, config.weights))
    return Adapted(_marked(model, target), record, finished)


def load_adapted(folder: str | Path, classifier: AnyModule) -> AnyModule:
    """A copy of a classifier with the weights that ``adapt`` wrote, in eval mode.

    Args:
        folder: with ``adaptation.json`` and ``classifier.safetensors``.
        classifier: a module of the adapted one's architecture; its own weights do not matter.

    Raises:
        BackboneFileError: a file is missing or damaged.
        ClassifierError: the weights are of another architecture, or the classifier is no module.
    """
    folder = expanded(folder)
    if not isinstance(classifier, nn.Module):
        raise ClassifierError(f"Weights are loaded into an nn.Module, but the classifier is {classifier!r}.")
    checksum, target = recorded_target(folder)
    try:
        check_sha256(folder / WEIGHTS_FILE, checksum)
    except FileNotFoundError as error:
        raise BackboneFileError(f"{folder / WEIGHTS_FILE} is missing: copy it too, or adapt again.") from error
    model = copy.deepcopy(classifier)
    try:
        model.load_state_dict(read_safetensors(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        raise ClassifierError(f"The weights in {folder} are of another architecture: {error}") from error
    return _marked(model.eval(), target)


def recorded_target(folder: Path) -> tuple[str, dict[str, Any]]:
    """The checksum of the weights that ``adapt`` wrote to a folder, and what they are adapted to.

    Raises:
        BackboneFileError: the record is missing or damaged.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return record["weights_sha256"], {name: record[name] for name in ("purifier", "backbone")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneFileError(
            f"{folder / RECORD_FILE} is no record of an adaptation ({error!r}). Give the folder that adapt wrote."
        ) from error


def _marked(model: AnyModule, target: Mapping[str, Any]) -> AnyModule:
    vars(model)["adapted_to"] = dict(target)
    return model


def _write(folder: Path, model: nn.Module, record: dict[str, Any], precision: str) -> None:
    """The weights and the record; ``record`` gets the checksum."""
    dtype = getattr(torch, precision)
    weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    there = {name: tensor.cpu() for name, tensor in weights.items()}
    written_whole(folder / WEIGHTS_FILE, lambda partial: write_safetensors(there, partial))
    record["weights_sha256"] = sha256_of(folder / WEIGHTS_FILE)
    write_json(folder / RECORD_FILE, record)


def _labelled(data: Any, model: PurifiedClassifier) -> LabelledImages:
    """The images of a data set as uint8 with their labels, all in memory."""
    data = labelled_data(data, model.image_shape[0], "train")
    if isinstance(data, LabelledImages):
        chosen = data
    else:
        found = SelectedImages.of(data, Subset())
        chosen = LabelledImages((found.images * 255).round().to(torch.uint8), found.labels)
    if not len(chosen):
        raise DataError("There must be one image at least, but the data set is empty.")
    weights = list(weights_of(model.classifier))
    if not weights:
        raise SettingsError("The classifier has no weights, so that nothing can be trained.")
    with torch.no_grad(), evaluating(model.classifier):
        first = model.preprocessing.to_unit((chosen.images[:1] / 255).to(weights[0]), weights[0].device)
        model.preprocessing.resized(first, model.image_shape[1:])  # which raises where the sizes do not fit
        classes = undefended_logits(model, first, "adapt").shape[1]
    SelectedImages(chosen.images, chosen.labels, torch.arange(len(chosen), device="cpu")).check_classes(
        classes, "classifier"
    )
    return chosen


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises ``OptionError`` for what is no option of ``adapt`` or of the wrapper."""
    fields = [field.name for field in dataclasses.fields(AdaptationConfig)]
    for name in options:
        if name in WRAPPER:
            continue
        named = {"epochs": "images", "lr": "learning_rate", "steps": "attack_steps", "eps": "eps"}.get(name, name)
        hint = near_matches(name, [*WRAPPER, *fields])
        if named == "eps":
            hint = " It belongs to the threat model: threat=ThreatModel(eps=...)."
        elif named in fields:
            hint = f" It belongs to the settings: config=AdaptationConfig({named}=...)."
        raise OptionError(f"adapt has no option {name!r}.{hint}")


def _fingerprint(data: LabelledImages) -> dict[str, Any]:
    return {"images": len(data), "sha256": tensor_checksum([("images", data.images), ("labels", data.labels)])}
