"""The input of step s: images, noise, flips and numbers, all of them functions of (seed, s)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cmap_defense.common.ranks import Ranks
from cmap_defense.common.rng import generator_for
from cmap_defense.errors import DataError
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.objectives import Batch, Model


class Draws:
    """Batches of a training set, drawn for all processes together: rank r has rows r, r + world, ...

    The order of the images, uint8 [N, C, H, W] on the CPU, is drawn on the CPU. Flips, noise and numbers are drawn on
    the network's device. For one seed they are the same bits on every CPU, and the same on every CUDA device of a kind,
    but not on both.
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None, config: TrainingConfig, device: torch.device, team: Ranks
    ) -> None:
        hold = config.hold_images
        if hold is None:  # where they are on the CPU anyway, or take a quarter of the free memory at most
            hold = device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4
        place = device if hold else images.device
        self.images, self.labels = images.to(place), None if labels is None else labels.to(place)
        self.config, self.device = config, device
        self.rows = slice(team.rank, None, team.world)

    def __call__(self, step: int) -> Batch:
        """This rank's rows of step ``step`` >= 0, on the device."""
        size, shape, seed = self.config.batch_size, self.images.shape[1:], self.config.seed
        generator = generator_for(seed, 2, step)
        if self.device.type != "cpu":
            generator = torch.Generator(self.device).manual_seed(generator.initial_seed())
        chosen = image_indices(step, size, len(self.images), seed)[self.rows]
        batch = self._taken(self.images, chosen).float() / 127.5 - 1
        if self.config.flip:
            mirrored = torch.rand(size, generator=generator, device=self.device)[self.rows] < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        uniform = torch.rand(size, generator=generator, device=self.device, dtype=torch.float64)[self.rows]
        z = torch.randn(size, *shape, generator=generator, device=self.device)[self.rows]
        labels = None if self.labels is None else self._taken(self.labels, chosen)
        return Batch(batch, z, uniform.clamp(1e-9, 1 - 1e-9), step / self.config.steps, labels)

    def _taken(self, tensors: Tensor, chosen: Tensor) -> Tensor:
        """Rows of a tensor, on the device, without waiting for a copy."""
        if tensors.device == self.device:
            return tensors[_sent(chosen, self.device)]
        return _sent(tensors[chosen], self.device)


def image_indices(step: int, batch_size: int, length: int, seed: int) -> Tensor:
    """The images of a step: epoch after epoch, each a permutation of its own; batches run over the epochs' borders."""
    start, parts, missing = step * batch_size, [], batch_size
    while missing:
        epoch, offset = divmod(start, length)
        parts.append(_permutation(epoch, length, seed)[offset : offset + missing])
        start, missing = start + len(parts[-1]), missing - len(parts[-1])
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def _permutation(epoch: int, length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=generator_for(seed, 1, epoch), device="cpu")


def check_data(model: Model, images: Tensor, labels: Tensor | None) -> None:
    """Check that a model can be trained on these images."""
    classes = model.num_classes
    if not isinstance(images, Tensor):
        raise DataError(f"Training images must be a tensor, but are {type(images).__name__}: torch.from_numpy(images).")
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != tuple(model.image_shape):
        raise DataError(
            f"Training images must be uint8 [N, {', '.join(map(str, model.image_shape))}], "
            f"but are {images.dtype} {list(images.shape)}."
        )
    if len(images) == 0:
        raise DataError("The training set is empty.")
    if (labels is None) != (classes is None):
        needed = "needs labels" if labels is None else "takes no labels"
        raise DataError(f"A model with num_classes={classes} {needed}.")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
        raise DataError(f"Labels must be int64 [{len(images)}], but are {labels.dtype} {list(labels.shape)}.")
    if labels is not None and not 0 <= labels.min() <= labels.max() < (classes or 0):
        raise DataError(f"Labels go from {labels.min()} to {labels.max()}, but the model has {classes} classes.")


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
