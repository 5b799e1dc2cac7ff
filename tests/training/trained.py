"""Trainings that take a moment.

A training is "plain" (ECT, one average, an unconditional network) or "rich" (CT, whose target is a running average, two
averages of the weights, classes, dropout, checkpoints in many parts).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones import CompactUNet, CompactUNetConfig, ConsistencyBackbone, EDMDenoiser
from cmap_defense.common.ranks import ranks
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.learner import Learner
from cmap_defense.training.loop import train
from cmap_defense.training.objectives import CT, ECT, Model, Objective

NETWORK = CompactUNetConfig(
    image_shape=(1, 8, 8), channels=(8, 8), blocks=1, attention=(False, False), head_channels=8, embedding=16
)
CONFIG = TrainingConfig(
    images=96,
    batch_size=8,
    learning_rate=2e-3,
    warmup_images=40,
    ema_half_life=(50,),
    precision="float32",
    checkpoint_every=32,
)
"""12 steps, checkpoints after 4, 8 and 12."""

PART = 20_000
"""Bytes of a part of a rich training's checkpoints, so that some tensors take several."""

RICH = CONFIG.replace(ema_half_life=(50, 3), checkpoint_part_mb=1)


def fresh_backbone(config: CompactUNetConfig = NETWORK, seed: int = 0) -> ConsistencyBackbone:
    """The tiny network with weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConsistencyBackbone(CompactUNet(config), config.image_shape, num_classes=config.num_classes)


def training_images(count: int = 50) -> Tensor:
    """uint8 [count, 1, 8, 8]: a bright half, left or right, on a dark ground, with noise."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 40, (count, 1, 8, 8), generator=generator)
    images[::2, :, :, :4] += 200
    images[1::2, :, :, 4:] += 200
    return images.to(torch.uint8)


def training_labels(count: int = 50) -> Tensor:
    """int64 [count]: which half is bright."""
    return torch.arange(count) % 2


def learner(
    objective: Objective | None = None,
    config: TrainingConfig = CONFIG,
    network: CompactUNetConfig = NETWORK,
    **given: Any,
) -> Learner:
    """A fresh learner of the tiny network, on the images and, where it is class-conditional, on the labels."""
    objective, backbone = objective or ECT(), fresh_backbone(network)
    model: Model = backbone
    if objective.kind == "denoiser":
        model = EDMDenoiser(backbone.network, backbone.image_shape, num_classes=network.num_classes)
    data = {"images": training_images(), "labels": None if network.num_classes is None else training_labels()}
    return Learner(given.pop("model", model), objective=objective, config=config, **data | given)


def run(
    folder: Path, what: str = "plain", *, changes: dict[str, Any] | None = None, **options: Any
) -> tuple[Learner, int]:
    """Train, or continue, in ``folder``: the learner and the number of steps done."""
    objective, config, network = (
        (CT(), RICH, NETWORK.replace(num_classes=2, dropout=0.1)) if what == "rich" else (ECT(), CONFIG, NETWORK)
    )
    with ranks() as team:
        made = learner(objective, config.replace(**changes or {}), network, team=team)
        return made, train(made, folder, parts={"network": network.to_dict()}, **options)


def result(learner: Learner) -> dict[str, Tensor]:
    """All weights and averages, and the rest of a checkpoint."""
    return learner.tensors()
