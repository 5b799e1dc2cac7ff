"""The training loop: a function of (network, images, settings, folder) that continues where it was stopped.

Every draw is a function of (seed, step), so a killed and continued training ends with the same weights, bit for bit
on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.errors import DataError
from cmap_defense.rng import generator_for
from cmap_defense.training.checkpoint import load_newest, save_checkpoint
from cmap_defense.training.ema import EMA
from cmap_defense.training.objectives import Batch, Objective
from cmap_defense.training.order import DataOrder
from cmap_defense.training.settings import TrainSettings

__all__ = ["TrainState", "train"]


@dataclasses.dataclass(frozen=True)
class TrainState:
    """What ``on_step`` sees after each optimiser step: steps done, of how many, and the mean loss of the step."""

    step: int
    steps: int
    loss: float


def train(
    backbone: ConsistencyBackbone,
    images: Tensor,
    objective: Objective,
    settings: TrainSettings,
    folder: Path,
    *,
    described: dict[str, Any],
    on_step: Callable[[TrainState], None] | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
) -> EMA:
    """Train ``backbone`` in place and return the averaged weights.

    Args:
        backbone: fresh; its weights are overwritten by the checkpoint's when ``folder`` holds one.
        images: uint8 [N, C, H, W], the training set, kept where it is.
        objective: losses per image.
        settings: of the loop.
        folder: receives checkpoints and ``log.jsonl`` (one line per checkpoint: step, mean loss since the last).
        described: further settings by part name; a checkpoint made with others is refused.
        on_step: called after each step.
        on_checkpoint: called after each checkpoint with the steps done, the averages being in ``backbone`` meanwhile.

    Raises:
        DataError: the images do not fit the backbone.
        CheckpointError: ``folder`` belongs to a training with other settings.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != tuple(backbone.image_shape):
        raise DataError(
            f"Training images must be uint8 [N, {', '.join(map(str, backbone.image_shape))}], "
            f"but are {images.dtype} {list(images.shape)}."
        )
    if len(images) == 0:
        raise DataError("The training set is empty.")
    folder.mkdir(parents=True, exist_ok=True)
    described = {"train": settings.to_dict(), **described}
    device = next(backbone.parameters()).device

    ema = EMA(backbone, settings.ema_half_life)
    optimiser = torch.optim.Adam(backbone.parameters(), lr=settings.learning_rate, betas=settings.betas)
    order = DataOrder(len(images), settings.batch_size, settings.seed)
    step = 0
    since: list[float] = []  # losses since the last checkpoint
    state = load_newest(folder, described)
    if state is not None:
        step = state["step"]
        backbone.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
        ema.load(state["ema"])

    every = max(1, settings.checkpoint_every // settings.batch_size)
    backbone.train()
    while step < settings.steps:
        loss = _step(backbone, images, objective, settings, optimiser, order, step, device)
        step += 1
        ema.update(backbone, batch_size=settings.batch_size, images_seen=step * settings.batch_size)
        since.append(loss)
        if on_step is not None:
            on_step(TrainState(step, settings.steps, loss))
        if step % every == 0 or step == settings.steps:
            mean = math.fsum(since) / len(since)
            since = []
            _log(folder / "log.jsonl", {"step": step, "images": step * settings.batch_size, "loss": mean})
            save_checkpoint(
                folder,
                step,
                {
                    "step": step,
                    "settings": described,
                    "weights": backbone.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "ema": ema.weights,
                },
            )
            if on_checkpoint is not None:
                with _averaged(backbone, ema):
                    on_checkpoint(step)
    return ema


def learning_rate(settings: TrainSettings, images_seen: float) -> float:
    """Linear warm-up, then a half cosine to zero at the end of the training."""
    rise = min(1.0, (images_seen + settings.batch_size) / max(1, settings.warmup_images))
    return settings.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / settings.images)))


def _step(
    backbone: ConsistencyBackbone,
    images: Tensor,
    objective: Objective,
    settings: TrainSettings,
    optimiser: torch.optim.Optimizer,
    order: DataOrder,
    step: int,
    device: torch.device,
) -> float:
    generator = generator_for(settings.seed, 2, step)
    batch = images[order.batch(step)].to(device).float() / 127.5 - 1
    if settings.flip:
        mirrored = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(mirrored[:, None, None, None].to(device), batch.flip(-1), batch)
    uniform = torch.rand(len(batch), generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    z = torch.randn(batch.shape, generator=generator)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(settings, step * settings.batch_size)
    with (
        _seeded(device, generator_for(settings.seed, 3, step).initial_seed()),
        torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"),
    ):
        drawn = Batch(batch, z.to(device), uniform.to(device), step / settings.steps)
        losses = objective.losses(backbone.denoise, drawn, backbone.noise, backbone.denoise)
    loss = losses.mean()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(backbone.parameters(), settings.clip_norm)
    optimiser.step()
    return loss.item()


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators, which dropout draws from, seeded; as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _averaged:
    """The averaged weights in the module, its own back afterwards."""

    def __init__(self, backbone: ConsistencyBackbone, ema: EMA) -> None:
        self.backbone, self.ema = backbone, ema

    def __enter__(self) -> None:
        self.own = {name: p.detach().clone() for name, p in self.backbone.named_parameters()}
        self.ema.copy_to(self.backbone)
        self.backbone.eval()

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, p in self.backbone.named_parameters():
            p.copy_(self.own[name])
        self.backbone.train()


def _log(path: Path, row: dict[str, Any]) -> None:
    """Append one line, dropping lines of the same or later steps that a killed run left behind."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [old for old in rows if old["step"] < row["step"]] + [row]
    partial = path.with_suffix(".partial")
    try:
        partial.write_text("".join(json.dumps(r) + "\n" for r in rows))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
