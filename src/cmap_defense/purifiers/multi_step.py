"""What purifiers share that add noise and denoise: noise, chunks, the way back, the result."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from cmap_defense.backbones.base import caster
from cmap_defense.backbones.karras import KarrasModel
from cmap_defense.cmap.optimise import check_replaced
from cmap_defense.cmap.unroll import Backward
from cmap_defense.common.rng import derived_seeds, draw_latents, draw_uniform
from cmap_defense.common.settings import Settings, require_integer
from cmap_defense.errors import BackboneError
from cmap_defense.purifiers.base import Purifier, out_of_inference_mode
from cmap_defense.results import PurificationResult

__all__ = ["Denoiser", "MultiStepPurifier", "Run", "StepState"]

LARGEST = 100.0
"""Magnitude of an image in [-1, 1], before it is clamped, from which it is taken for one of other units."""

UNIFORM = 0x0F0F
"""Makes uniform numbers independent of the noise of the same seeds."""


@dataclasses.dataclass(frozen=True)
class StepState:
    """What a callback sees before a network pass. The tensors are the purifier's own: do not change them in place, but
    return other images. They are part of the graph to the input where there is one; a hook of ``PurifiedClassifier``
    that is not live is given detached ones.

    Attributes:
        step: number of the pass, from 0.
        steps: passes of a version, at most.
        level: standard deviation of the noise in the images; where it differs between images, the largest.
        images: [B, K, C, H, W] in units of [-1, 1], with their noise.
        inputs: [B, C, H, W] in [0, 1], what is purified.
    """

    step: int
    steps: int
    level: float
    images: Tensor
    inputs: Tensor

    def detached(self) -> StepState:
        """The same without a graph."""
        return dataclasses.replace(self, images=self.images.detach(), inputs=self.inputs.detach())


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """D of any number of images, in chunks.

    Attributes:
        backbone: what has ``denoise``.
        call: its ``denoise``, cast.
        class_labels: [M] integers for a class-conditional backbone, None for another.
        chunk: images in one call.
        checkpoint: make the graph of a chunk again in the backward pass in place of keeping it.
    """

    backbone: nn.Module
    call: Callable[..., Tensor]
    class_labels: Tensor | None
    chunk: int
    checkpoint: bool

    def __call__(self, noisy: Tensor, sigma: Tensor | float, rows: Tensor | None = None) -> Tensor:
        """D(noisy, sigma), not clipped, differentiable.

        Args:
            noisy: [M, C, H, W], images in [-1, 1] with noise.
            sigma: standard deviation of the noise, a number or one for each image [M].
            rows: [M] integers, which images of the run these are; None for all of them.

        Returns:
            [M, C, H, W] in the precision of ``noisy``.

        Raises:
            BackboneError: the backbone returned another shape, or images that do not depend on ``noisy`` for autograd.
        """
        labels = self.class_labels if rows is None or self.class_labels is None else self.class_labels[rows]
        return self.in_chunks(self.once, noisy, sigma, labels)

    def once(self, noisy: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """The same for the images of one chunk, with an ordinary graph."""
        labels = () if class_labels is None else (class_labels,)
        if isinstance(sigma, Tensor) and not isinstance(self.backbone, KarrasModel):  # which may take numbers alone
            rows = zip(noisy.split(1), sigma, *(given.split(1) for given in labels), strict=True)
            clean = torch.cat([_denoised(self.call(*row), row[0]) for row in rows])
        else:
            clean = _denoised(self.call(noisy, sigma, *labels), noisy)
        if torch.is_grad_enabled() and noisy.requires_grad and not clean.requires_grad:
            raise BackboneError.without_graph(
                "noisy images"
            )  # or else the gradient would be that of the noisy images alone
        return clean.to(noisy.dtype)

    def in_chunks(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """A function of images, image by image, evaluated chunk by chunk.

        Args:
            function: takes parts of the arguments.
            arguments: the first is [M, ...]; other tensors are [M, ...] too and cut alike, the rest is handed on.

        Returns:
            What it returned for all M.
        """
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        again = self.checkpoint and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        found = []
        for begin in range(0, len(tensors[0]), self.chunk):
            rows = slice(begin, begin + self.chunk)
            part = [argument[rows] if isinstance(argument, Tensor) else argument for argument in arguments]
            found.append(recomputed(function, *part, use_reentrant=False) if again else function(*part))
        return found[0] if len(found) == 1 else torch.cat(found)


def _denoised(clean: Any, noisy: Tensor) -> Tensor:
    """What a backbone's ``denoise`` returned. Raises ``BackboneError`` where it is no tensor of the images' shape."""
    if not isinstance(clean, Tensor) or clean.shape != noisy.shape:
        came = list(clean.shape) if isinstance(clean, Tensor) else type(clean).__name__
        raise BackboneError(f"The backbone's denoise must return {list(noisy.shape)}, but returned {came}.")
    return clean


@dataclasses.dataclass
class Run:
    """One purification of B images, K versions of each, as M = B K images: those of the first image first.

    Attributes:
        images: [M, C, H, W], the inputs in [-1, 1], float32 at least.
        denoise: the denoiser.
        seeds: [B], of the noise.
        first: [B, K, C, H, W], the first noise.
        steps: network passes of a version, at most.
        callback: called by ``watch``.
        passes: [M] int64, the network passes made, set by a purifier that may stop early.
    """

    images: Tensor
    denoise: Denoiser
    seeds: Tensor
    first: Tensor
    steps: int
    callback: Callable[[StepState], Any] | None = None
    passes: Tensor | None = None
    _drawn: int = 0

    def noise(self) -> Tensor:
        """Unit noise [M, C, H, W], independent of that of earlier calls: a function of (seed, version, call) alone."""
        drawn, step = self.first, self._drawn
        self._drawn += 1
        if step:
            drawn = draw_latents(self.seeds, self.first.shape[1], self.first.shape[2:], step=step)
        return drawn.to(self.images).flatten(0, 1)

    def uniform(self) -> Tensor:
        """Numbers [M] in [0, 1), independent of those of earlier calls and of the noise."""
        drawn = draw_uniform(derived_seeds(self.seeds, UNIFORM), self.first.shape[1:2], step=self._drawn)
        self._drawn += 1
        return drawn.to(self.images).flatten()

    def watch(self, step: int, level: float, images: Tensor) -> Tensor:
        """Tell the callback of the pass that comes next: its number, its noise level, and its images [M, C, H, W].

        Returns:
            The images [M, C, H, W] to go on with: the same, or what the callback returned in their place.
        """
        if self.callback is None:
            return images
        shown, inputs = (part.unflatten(0, self.first.shape[:2]) for part in (images, self.images))
        replaced = self.callback(StepState(step, self.steps, level, shown, (inputs[:, 0] + 1) / 2))
        return images if replaced is None else check_replaced(replaced, shown).flatten(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStepPurifier(Settings, Purifier):
    """Base of purifiers that add noise and denoise, in one step or many.

    A subclass writes ``reverse``, ``level``, ``steps`` and the field ``n_latents``. Its gradient is that of
    ``reverse``: additive noise takes no part in it, and each pass of the denoiser is made again on the way back.
    """

    kind: ClassVar[str | None] = "denoiser"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(type(self).__name__, "n_latents", self.n_latents, minimum=1)  # a field may be plain

    @property
    @abc.abstractmethod
    def level(self) -> float:
        """Standard deviation of the strongest noise, in units of images in [-1, 1]."""

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """The largest number of network passes that a version takes; 0 where the purifier gives its input back."""

    @abc.abstractmethod
    def reverse(self, run: Run) -> Tensor:
        """Purified images [M, C, H, W] in units of [-1, 1], not clamped; differentiable in ``run.images``."""

    @property
    def passes(self) -> int:
        return self.n_latents * self.steps

    @out_of_inference_mode
    def __call__(
        self,
        backbone: nn.Module,
        images: Tensor,
        *,
        seeds: Tensor,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        callback: Callable[[StepState], Any] | None = None,
        max_parallel: int | None = None,
        checkpoint: bool = True,
    ) -> PurificationResult:
        """Purify images; differentiable. Arguments as for ``Purifier``, and:

        Args:
            backbone: of the kind that ``kind`` names.
            latents: the first noise, which may have a gradient; that of later steps is drawn from the seeds all the
                same.
            callback: called before each network pass with a ``StepState``; images [B, K, C, H, W] that it returns take
                the place of the state's.
            checkpoint: compute each pass again in the backward pass in place of keeping its graph.

        Raises:
            WrongKindError: the backbone is of another kind.
            SettingsError: the backbone was not trained for noise as strong as ``level``.
            BackboneError: the backbone's images have another shape than their input, or are not finite.
        """
        backbone = self.member(backbone)
        self.check(backbone)
        dtype = torch.promote_types(images.dtype, torch.float32)
        images = images.to(dtype)
        first = draw_latents(seeds, self.n_latents, images.shape[1:]) if latents is None else latents
        first = first.to(images.device, dtype)
        drawn_from = seeds if latents is None else None
        if not self.steps or not len(first):
            unchanged = images[:, None].expand(first.shape)
            return PurificationResult(unchanged, first.detach(), seeds=drawn_from, class_labels=class_labels)
        count = first.shape[0] * first.shape[1]
        call = caster(backbone, images.device, "denoise")
        conditional = getattr(backbone, "num_classes", None) is not None  # of a pair perhaps only the other one
        own_labels = class_labels if conditional else None
        if max_parallel is None:
            max_parallel = self.fitting(backbone, images.shape[1:], images.device)
        with torch.autocast(images.device.type, enabled=False):
            run = Run(
                (2 * images - 1).repeat_interleave(first.shape[1], dim=0),
                Denoiser(
                    backbone,
                    call,
                    None if own_labels is None else own_labels.flatten(),
                    max_parallel,
                    checkpoint and (self.steps > 1 or count > max_parallel),
                ),
                seeds,
                first,
                self.steps,
                callback,
            )
            found = self.reverse(run)
        largest = found.detach().abs().amax().item()
        if not math.isfinite(largest):
            raise BackboneError(
                "The backbone's images became NaN or infinite. A backbone in float16 overflows easily: use bfloat16 or "
                "float32."
            )
        if largest > LARGEST:
            raise BackboneError(
                f"The purified images go up to {largest:.4g} before they are clamped to [-1, 1]. The backbone's "
                f"denoise must return images in [-1, 1]; where it does, {self!r} diverges."
            )
        purified = ((found.clamp(-1, 1) + 1) / 2).unflatten(0, first.shape[:2])
        made = None if run.passes is None else run.passes.view(first.shape[:2]).sum(dim=1)
        return PurificationResult(purified, first.detach(), seeds=drawn_from, class_labels=class_labels, passes=made)

    def differentiate(
        self, backbone: nn.Module, images: Tensor, *, backward: Backward, **options: Any
    ) -> PurificationResult:
        return self(backbone, images, checkpoint=backward.checkpoint, **options)
