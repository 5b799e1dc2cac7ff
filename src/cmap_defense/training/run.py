"""A whole training: data, network, loop, and a backbone folder with a sample sheet at every checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones.folder import write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.rng import draw_latents
from cmap_defense.training.loop import TrainState, train
from cmap_defense.training.objectives import ECT, ECTSettings
from cmap_defense.training.settings import TrainSettings

__all__ = ["sample_grid", "train_backbone"]

SAMPLES = 64


def train_backbone(
    images: Tensor,
    folder: Path,
    *,
    network: CompactUNetConfig,
    objective: ECTSettings,
    settings: TrainSettings,
    described: dict[str, Any],
    device: str = "cpu",
    compile_network: bool = False,
    weights_dtype: torch.dtype = torch.float32,
    on_step: Callable[[TrainState], None] | None = None,
    on_samples: Callable[[Tensor], None] | None = None,
) -> ConsistencyBackbone:
    """Train a backbone by consistency training, or continue a training, and write ``folder/backbone``.

    Args:
        images: uint8 [N, C, H, W].
        folder: of the training: checkpoints, log, and ``backbone/``, which is written anew at every checkpoint.
        network, objective, settings: what is trained, on what loss, how long.
        described: fields of the record (``name`` at least); what the training saw belongs in ``training``.
        device: where to train.
        compile_network: run the network through torch.compile.
        weights_dtype: precision of the written weights.
        on_step: called after every step.
        on_samples: called at every checkpoint with 64 samples [64, C, H, W] in [0, 1], always from the same noise.

    Returns:
        The backbone with the averaged weights, in eval mode.

    Raises:
        DataError: the images do not fit the network.
        CheckpointError: the folder belongs to a training with other settings.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        backbone = ConsistencyBackbone(CompactUNet(network), network.image_shape).to(device)
    if compile_network:
        backbone.network.compile()
    settings_by_part = {
        "objective": objective.to_dict(),
        "network": network.to_dict(),
        "data": {"images": len(images), "sha256": hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()},
    }
    record = dict(described)
    record["training"] = {
        **record.get("training", {}),
        "train": settings.to_dict(),
        "objective": {"name": "ECT", **objective.to_dict()},
        "images": len(images),
    }

    def checkpoint(step: int) -> None:
        seen = {"images_seen": step * settings.batch_size}
        write_backbone(
            backbone, folder / "backbone", dtype=weights_dtype, **{**record, "training": record["training"] | seen}
        )
        if on_samples is not None:
            on_samples(sample_grid(backbone))

    ema = train(
        backbone,
        images,
        ECT(objective),
        settings,
        folder,
        described=settings_by_part,
        on_step=on_step,
        on_checkpoint=checkpoint,
    )
    ema.copy_to(backbone)
    backbone.eval()
    checkpoint(settings.steps)  # also where a kill came between the last checkpoint and its backbone
    return backbone


@torch.no_grad()
def sample_grid(backbone: ConsistencyBackbone, seed: int = 0) -> Tensor:
    """64 one-step samples [64, C, H, W] in [0, 1], always from the same noise."""
    latents = draw_latents(torch.tensor([seed]), SAMPLES, backbone.image_shape)[0]
    device = next(backbone.parameters()).device
    return (backbone.generate(latents.to(device)) + 1) / 2
