"""A whole training: data, network, loop, and a backbone folder with samples at every checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones.folder import RECORD_FILE, clear_leftovers, read_record, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, KarrasModel, NoiseRange, karras_levels
from cmap_defense.backbones.networks import Network, refuse_other_network
from cmap_defense.common.files import locked, write_text
from cmap_defense.common.modules import device_of
from cmap_defense.common.paths import expanded
from cmap_defense.common.progress import OnProgress
from cmap_defense.common.ranks import ranks
from cmap_defense.common.rng import draw_latents
from cmap_defense.errors import BackboneFileError, CheckpointError, SettingsError
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.draws import check_data
from cmap_defense.training.learner import Learner
from cmap_defense.training.loop import TrainState, countdown, train
from cmap_defense.training.objectives import MODELS, Model, Objective, heun_step
from cmap_defense.training.plan import settled


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedBackbone:
    """The result of ``train_backbone``.

    Attributes:
        model: the model with the averaged weights, in eval mode.
        config: the settings with the length and the precision of the training.
        images_seen: images that it was trained on, counted with repetition.
        finished: whether these are all.
    """

    model: Model
    config: TrainingConfig
    images_seen: int
    finished: bool


def train_backbone(
    images: Tensor,
    folder: str | Path,
    *,
    network: Network,
    objective: Objective,
    config: TrainingConfig | None = None,
    labels: Tensor | None = None,
    start: KarrasModel | None = None,
    record: Callable[[TrainingConfig], dict[str, Any]] | None = None,
    seconds_left: Callable[[], float] | None = None,
    on_step: Callable[[TrainState], None] | None = None,
    on_samples: Callable[[Tensor], None] | None = None,
    progress: OnProgress = None,
) -> TrainedBackbone:
    """Train a backbone, or continue a training, and write ``folder/backbone``.

    Under torchrun every process calls this, and the first one writes.

    Args:
        images: uint8 [N, C, H, W].
        folder: for checkpoints, the log, and ``backbone/``, which is written anew at every checkpoint. At the end
            ``backbone-<half-life>/`` holds the averages of each further half-life.
        network: the network to train.
        objective: losses per image.
        config: settings of the training; None for the defaults.
        labels: int64 [N], for a class-conditional network.
        start: a model of the same network, whose weights are the first ones; None for fresh weights.
        record: returns fields of the backbone's record for the settings with the chosen length, its ``training`` among
            them. None: its name is that of the folder.
        seconds_left: ``countdown`` of the minutes, where they began before this call.
        on_step: called after every step.
        on_samples: called at every checkpoint with 64 samples [64, C, H, W] in [0, 1], always from the same noise.
        progress: True for a bar on standard error, or a function of (done, total): steps.

    Raises:
        DataError: the images do not fit the network.
        SettingsError: ``start`` is of another network, or the minutes are too few for one step.
        CheckpointError: the folder belongs to a training with other settings, or another training is writing to it.
        TrainingError: the training has diverged.
    """
    for name, given, kind, example in (
        ("network", network, Network, 'Network.named("compact", (3, 32, 32))'),
        ("objective", objective, Objective, "ECT()"),
        ("config", config, TrainingConfig, "TrainingConfig(images=10_000)"),
        ("start", start, KarrasModel, 'load_backbone("fashion-mnist-ct")'),
    ):
        if not (isinstance(given, kind) or (given is None and name in ("config", "start"))):
            raise SettingsError(f"train_backbone takes {name} as an object such as {example}, but got {given!r}.")
    folder, config = expanded(folder), config or TrainingConfig()
    seconds_left = seconds_left or (None if config.minutes is None else countdown(config.minutes))
    model = _fresh_model(network, objective, config, start)
    check_data(model, images, labels)
    sources = dict(objective.sources)
    if start is not None and start.record is not None:
        sources = {"from": source_of(start), **sources}
    parts = {"objective": objective.describe(), "network": network.describe(), "data": _fingerprint(images, labels)}
    parts |= sources
    with ranks() as team, locked(folder, "training", CheckpointError, team):

        def made(config: TrainingConfig) -> Learner:
            return Learner(model, images, labels, objective, config, team)

        beside = None if on_samples is None else lambda learner: sample_grid(learner.model)
        config = settled(config, folder, parts, team, seconds_left, made, beside)
        fields: dict[str, Any] = {"name": folder.name} if record is None else record(config)
        trained_on = {
            **fields.get("training", {}),
            **sources,
            "train": config.reproducible(),
            "objective": objective.describe(),
            "images": len(images),
        }
        if "from" in sources and start is not None and start.record is not None and start.record.training:
            trained_on["from"] = {**sources["from"], "training": start.record.training}

        def write(step: int, name: str = "backbone") -> None:
            seen = {"images_seen": step * config.batch_size}
            place, before = folder / name, None
            with contextlib.suppress(BackboneFileError):
                before = read_record(place)
            clear_leftovers(place)
            dtype = getattr(torch, config.weights)
            now = write_backbone(model, place, dtype=dtype, **fields | {"training": trained_on | seen})
            if before is not None and before.weights_sha256 == now.weights_sha256:
                found = {name: getattr(before, name) for name in ("figures", "settings", "presets")}
                kept = now.replace(**{name: value for name, value in found.items() if value})  # about the same weights
                write_text(place / RECORD_FILE, kept.to_json(indent=2) + "\n")

        written: set[int] = set()

        def checkpoint(step: int) -> None:
            if step not in written:
                write(step)
                if on_samples is not None:
                    on_samples(sample_grid(model))
                written.add(step)

        learner = made(config)
        step = train(
            learner,
            folder,
            parts=parts,
            seconds_left=seconds_left,
            on_step=on_step,
            on_checkpoint=checkpoint,
            progress=progress,
        )
        model.eval()
        finished = step >= config.steps
        for average in reversed(learner.averages):
            average.copy_to(model)
            if finished and average is not learner.averages[0]:
                team.by_first(functools.partial(write, step, f"backbone-{average.half_life}"))
        if finished:  # a kill may have come between the last checkpoint and its backbone
            team.by_first(functools.partial(checkpoint, step))
    return TrainedBackbone(model, config, step * config.batch_size, finished)


def source_of(model: KarrasModel) -> dict[str, Any]:
    """Name, kind and checksum of a model that came from a folder, for records."""
    assert model.record is not None
    return {name: getattr(model.record, name) for name in ("name", "kind", "weights_sha256")}


def _fresh_model(network: Network, objective: Objective, config: TrainingConfig, start: KarrasModel | None) -> Model:
    """A model of the objective's kind on the device, with weights from the seed or those of ``start``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        built = network.build()
    noise = NoiseRange() if start is None else start.noise
    model = MODELS[objective.kind](built, network.image_shape, noise, network.num_classes)
    if start is not None:
        refuse_other_network(built, start.network)
        built.load_state_dict(start.network.state_dict())
    return model.to(config.device)


def _fingerprint(images: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Number and SHA-256 of the images, with their labels where they are used."""
    digest = hashlib.sha256()
    for tensor in (images,) if labels is None else (images, labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return {"images": len(images), "sha256": digest.hexdigest()}


SAMPLES = 64
LEVELS = 18
"""Noise levels of a denoiser's sampler (arXiv 2206.00364, Table 1, for CIFAR-10)."""


@torch.no_grad()
def sample_grid(model: Model, seed: int = 0) -> Tensor:
    """64 samples of a model; of a class-conditional one, class after class.

    A consistency model makes them in one step, a denoiser in 18 steps of Heun's method (arXiv 2206.00364, Algorithm 1).
    """
    device = device_of(model) or torch.device("cpu")
    latents = draw_latents(torch.tensor([seed]), SAMPLES, model.image_shape)[0].to(device)
    classes = None if model.num_classes is None else torch.arange(SAMPLES, device=device) % model.num_classes
    if isinstance(model, ConsistencyBackbone):
        return (model.generate(latents, classes) + 1) / 2
    denoise = functools.partial(model.denoise, class_labels=classes)
    levels = [latents.new_full((SAMPLES,), level) for level in reversed(karras_levels(LEVELS, model.noise))]
    images = model.noise.sigma_max * latents
    for t, r in itertools.pairwise(levels):
        images = heun_step(denoise, images, t, r)
    return (denoise(images, levels[-1]).clamp(-1, 1) + 1) / 2  # the last step, to no noise, is one of Euler's
