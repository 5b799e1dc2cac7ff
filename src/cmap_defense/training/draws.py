"""What step s has to work with: images, noise, flips and numbers, all of them functions of (seed, s)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmap_defense.ranks import Ranks
from cmap_defense.rng import generator_for
from cmap_defense.training.objectives import Batch
from cmap_defense.training.order import DataOrder
from cmap_defense.training.settings import TrainSettings

__all__ = ["Draws", "fits_beside"]


class Draws:
    """Batches of a training set, drawn for all processes together and dealt out: rank r has rows r, r + world, ...

    The order of the images is drawn on the CPU. Flips, noise and numbers are drawn where the network is: for one seed
    they are the same bits on every CPU, and the same on every CUDA device of a kind, but not on both.

    Args:
        images: uint8 [N, C, H, W] on the CPU. labels: int64 [N], or None.
        settings: batch size, flips and seed.
        device: of the network.
        hold: keep images and labels there; otherwise each batch is sent when it is drawn.
        team: the processes that share a batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        settings: TrainSettings,
        *,
        device: torch.device,
        hold: bool,
        team: Ranks,
    ) -> None:
        place = device if hold else images.device
        self.images, self.labels = images.to(place), None if labels is None else labels.to(place)
        self.order = DataOrder(len(images), settings.batch_size, settings.seed)
        self.settings, self.device = settings, device
        self.rows = slice(team.rank, None, team.world)

    def __call__(self, step: int) -> Batch:
        """This rank's rows of step ``step`` >= 0; on the device."""
        size, shape = self.settings.batch_size, self.images.shape[1:]
        generator = self._generator(step)
        chosen = self.order.batch(step)[self.rows]
        batch = self._taken(self.images, chosen).float() / 127.5 - 1
        if self.settings.flip:
            mirrored = torch.rand(size, generator=generator, device=self.device)[self.rows] < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        uniform = torch.rand(size, generator=generator, device=self.device, dtype=torch.float64)[self.rows]
        z = torch.randn(size, *shape, generator=generator, device=self.device)[self.rows]
        labels = None if self.labels is None else self._taken(self.labels, chosen)
        return Batch(batch, z, uniform.clamp(1e-9, 1 - 1e-9), step / self.settings.steps, labels)

    def _generator(self, step: int) -> torch.Generator:
        on_cpu = generator_for(self.settings.seed, 2, step)
        if self.device.type == "cpu":
            return on_cpu
        return torch.Generator(self.device).manual_seed(on_cpu.initial_seed())

    def _taken(self, tensors: Tensor, chosen: Tensor) -> Tensor:
        """Rows of a tensor, on the device; nobody waits for a copy."""
        if tensors.device == self.device:
            return tensors[_sent(chosen, self.device)]
        return _sent(tensors[chosen], self.device)


def fits_beside(images: Tensor, device: torch.device) -> bool:
    """Whether the images take a quarter of the device's free memory at most; always on the CPU, where they are."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= free / 4


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
