"""A whole training: data, network, loop, and a backbone folder with samples at every checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones.folder import RECORD_FILE, read_record, write_backbone
from cmap_defense.backbones.karras import KarrasModel, NoiseRange
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.errors import BackboneFileError
from cmap_defense.ranks import ranks
from cmap_defense.training.budget import Budget
from cmap_defense.training.files import locked, write_whole
from cmap_defense.training.learner import Learner
from cmap_defense.training.loop import TrainState, check_data, train
from cmap_defense.training.models import MODELS, Model
from cmap_defense.training.networks import Network
from cmap_defense.training.objectives import Objective
from cmap_defense.training.plan import length_so_far, planned
from cmap_defense.training.precision import resolve_precision
from cmap_defense.training.samples import sample_grid
from cmap_defense.training.settings import Execution, TrainSettings
from cmap_defense.training.start import load_weights, source_of

__all__ = ["TrainedBackbone", "train_backbone"]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedBackbone:
    """What :func:`train_backbone` leaves: the model with the averaged weights in eval mode, the settings with the
    length that was trained for, images seen, and whether these are all."""

    model: Model
    settings: TrainSettings
    images_seen: int
    finished: bool


def train_backbone(
    images: Tensor,
    folder: Path,
    *,
    network: Network,
    objective: Objective,
    settings: TrainSettings,
    described: Callable[[TrainSettings], dict[str, Any]],
    labels: Tensor | None = None,
    start: KarrasModel | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    budget: Budget | None = None,
    plan: bool = False,
    execution: Execution | None = None,
    device: str = "cpu",
    weights_dtype: torch.dtype = torch.float32,
    on_step: Callable[[TrainState], None] | None = None,
    on_samples: Callable[[Tensor], None] | None = None,
) -> TrainedBackbone:
    """Train a backbone, or continue a training, and write ``folder/backbone``.

    Under torchrun every process calls this, and the first one writes.

    Args:
        images: uint8 [N, C, H, W].
        folder: of the training: checkpoints, log, and ``backbone/``, which is written anew at every checkpoint. At the
            end ``backbone-<half-life>/`` holds the averages of each further half-life.
        network, objective, settings: what is trained, on what loss, how long.
        described: fields of the record (``name`` at least) for the settings with the length that was chosen; what the
            training saw belongs in ``training``.
        labels: int64 [N], for a class-conditional network.
        start: a model of the same network, whose weights are the first ones; None for fresh weights. How it was
            trained, where its record says so, goes into the new one.
        sources: where other weights came from, such as those of ``start``: by role, name and checksum; for the record,
            and to refuse a checkpoint that was made with others.
        budget: when it is spent, the training stops with a checkpoint and the backbone as it is then.
        plan: the length is that of the calls before, or, where there is a budget, chosen so that the training ends
            inside it, see :func:`~cmap_defense.training.plan.planned`; else that of the settings.
        execution: how it is carried out.
        device: where to train.
        weights_dtype: precision of the written weights.
        on_step: called after every step.
        on_samples: called at every checkpoint with 64 samples [64, C, H, W] in [0, 1], always from the same noise.

    Raises:
        DataError: the images do not fit the network.
        SettingsError: ``start`` is of another network.
        CheckpointError: the folder belongs to a training with other settings, or another one is writing to it.
        TrainingError: the training has diverged.
    """
    execution = execution or Execution()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        built = network.build()
    noise = NoiseRange() if start is None else start.noise
    model = MODELS[objective.kind](built, network.image_shape, noise, network.num_classes)
    if start is not None:
        load_weights(model, start)
    model = model.to(device)
    check_data(model, images, labels)
    parts = {
        "objective": objective.describe(),
        "network": network.describe(),
        "data": _fingerprint(images, labels),
        **(sources or {}),
    }
    with ranks() as team, locked(folder, team):
        settings = resolve_precision(settings, device, folder, team)
        so_far = length_so_far(settings, folder, parts, team) if plan else None
        if so_far is not None:
            settings = settings.replace(images=so_far)
        elif budget is not None and plan:
            learner = Learner(model, images, labels, objective, settings, execution, team)
            settings = planned(
                learner, folder, parts, budget, execution, beside=None if on_samples is None else sample_grid
            )
            del learner
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # or the images might seem not to fit any more
        record = described(settings)
        record["training"] = {
            **record.get("training", {}),
            **(sources or {}),
            "train": settings.to_dict(),
            "objective": objective.describe(),
            "images": len(images),
        }
        if start is not None and start.record is not None and start.record.training:
            record["training"]["from"] = {**source_of(start), "training": start.record.training}

        def write(step: int, name: str = "backbone") -> None:
            seen = {"images_seen": step * settings.batch_size}
            fields = record | {"training": record["training"] | seen}
            before = _record(folder / name)
            write_backbone(model, folder / name, dtype=weights_dtype, **fields)
            _keep_what_was_found(folder / name, before)

        def checkpoint(step: int) -> None:
            write(step)
            if on_samples is not None:
                on_samples(sample_grid(model))

        trained = train(
            model,
            images,
            objective,
            settings,
            folder,
            described=parts,
            labels=labels,
            budget=budget,
            execution=execution,
            on_step=on_step,
            on_checkpoint=checkpoint,
        )
        model.eval()
        for average in reversed(trained.averages):
            average.copy_to(model)
            if trained.finished and average is not trained.averages[0]:
                team.by_first(functools.partial(write, trained.step, f"backbone-{average.half_life}"))
        if trained.finished:  # also where a kill came between the last checkpoint and its backbone
            team.by_first(functools.partial(checkpoint, trained.step))
    return TrainedBackbone(model, settings, trained.step * settings.batch_size, trained.finished)


def _record(folder: Path) -> BackboneRecord | None:
    """That of a backbone which is there, and can be read."""
    try:
        return read_record(folder)
    except BackboneFileError:
        return None


def _keep_what_was_found(folder: Path, before: BackboneRecord | None) -> None:
    """Figures and CMAP settings that were written into the record of the same weights."""
    record = read_record(folder)
    if before is not None and before.weights_sha256 == record.weights_sha256 and (before.figures or before.settings):
        kept = record.replace(figures=before.figures, settings=before.settings)
        write_whole(folder / RECORD_FILE, kept.to_json(indent=2) + "\n")


def _fingerprint(images: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Number and SHA-256 of the images, with their labels where they are used."""
    digest = hashlib.sha256()
    for tensor in (images,) if labels is None else (images, labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return {"images": len(images), "sha256": digest.hexdigest()}
