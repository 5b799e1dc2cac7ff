"""Eq. 9 of one batch as a function of its latents and its images, with first and second derivatives, in chunks.

The loop, the gradients through it and attacks on the latents all work on this one object, so none of them sees another
objective than the others. What the derivatives are taken of is K L, the sum over the K latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.cmap.losses import ObjectiveTerms, combine_terms, latent_term, perceptual_terms
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.errors import BackboneError, InputValueError

SECOND_ORDER = 3
"""Memory of a latent's second derivatives, in units of that of its first ones."""

Generate = Callable[..., Tensor]
"""Unit latents [M, C, H, W] to images [M, C, H, W] in [-1, 1].

Where the settings have a level, it is given the inputs [M, C, H, W] in [0, 1] after the latents. Where there are class
labels, it is given those [M] last.
"""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """What some of the B K latents of a batch are compared with: their images by index, and these prepared for SSIM."""

    owners: Tensor
    reference: SSIMReference


@dataclasses.dataclass(eq=False, repr=False)
class LatentObjective:
    """L of eq. 9 for images [B, C, H, W] and their K latents.

    Args:
        generate: the generator, see ``Generate``; gradients must flow from its output to its input.
        images: [B, C, H, W] in [0, 1], float32 or float64, detached.
        n_latents: K.
        settings: the constants.
        class_labels: [B, K] integers, each handed to ``generate`` along with its latent; None for none.
        max_parallel: latents per call of ``generate``, a third of them for second derivatives; None for all B K at
            once. It changes memory, not the result beyond rounding.
        fast: the same generator for first derivatives alone, such as a compiled one; None for ``generate``.
        fast_terms: ``stacked_terms`` for first derivatives alone, likewise; None for ``perceptual_terms``.

    Raises:
        InputValueError: the labels do not fit.
    """

    generate: Generate
    images: Tensor
    n_latents: int
    settings: CMAPSettings
    _: dataclasses.KW_ONLY
    class_labels: Tensor | None = None
    max_parallel: int | None = None
    fast: Generate | None = None
    fast_terms: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        self.images = self.images.detach()
        self.shape = (len(self.images), self.n_latents)
        if self.class_labels is not None and tuple(self.class_labels.shape) != self.shape:
            raise InputValueError(
                f"Class labels must be [B, K] = {list(self.shape)}, but are {list(self.class_labels.shape)}."
            )
        every = max(1, math.prod(self.shape))
        self.chunk = self.max_parallel or every
        self._second = max(1, self.max_parallel // SECOND_ORDER) if self.max_parallel else every
        reference = SSIMReference.of(self.images)
        self._owners = torch.arange(len(self.images), device=self.images.device).repeat_interleave(self.n_latents)
        self._chunks = [_Chunk(part, reference.take(part)) for part in self._owners.split(self.chunk)]

    def take(self, rows: Tensor) -> LatentObjective:
        """The objective of the images at positions ``rows``."""
        labels = None if self.class_labels is None else self.class_labels[rows]
        return dataclasses.replace(self, images=self.images[rows], class_labels=labels)

    def gradient(self, latents: Tensor, *, keep_images: bool = False) -> tuple[ObjectiveTerms, Tensor, Tensor]:
        """The terms at latents [B, K, C, H, W], d(K L)/du, and G(u) where ``keep_images``; all without a graph.

        Raises:
            BackboneError: ``generate`` returned another shape, or something without a gradient.
        """
        l1s, ssims, gradients, kept = [], [], [], []
        parts = latent_chunks(latents, self.class_labels, self.chunk)
        for (part, *labels), chunk in zip(parts, self._chunks, strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                inputs = self.images if self.settings.level is None else self.images[chunk.owners]
                generated = self._generated(self.fast or self.generate, leaf, inputs, *labels)
                l1, ssim = self._terms(generated, chunk.reference)
                loss = (l1 - self.settings.ssim_weight * ssim).sum()
                (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
            if gradient is None:
                raise BackboneError.without_graph("latents")
            l1s.append(l1.detach())
            ssims.append(ssim.detach())
            gradients.append(gradient)
            if keep_images:
                kept.append(generated.detach())
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            latent = latent_term(leaf)
            (pull,) = torch.autograd.grad(self._latent_weight * latent.sum(), leaf)
        l1, ssim = torch.cat(l1s).view(self.shape), torch.cat(ssims).view(self.shape)
        terms = combine_terms(l1, ssim, latent.detach(), self.settings)
        images = torch.cat(kept).unflatten(0, self.shape) if keep_images else latents.new_empty(0)
        return terms, torch.cat(gradients).view_as(latents) + pull, images

    def products(
        self, latents: Tensor, along: Tensor, *, l1_smoothing: float, mixed: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Second derivatives of K L times a direction, without a graph.

        Args:
            latents: u, [B, K, C, H, W].
            along: c, of that shape.
            l1_smoothing: of L1 here, at least; without any, L1 has no second derivative and c sees the images through
                SSIM alone.
            mixed: False leaves the second product at zero, which saves a little.

        Returns:
            H c with H = d^2(K L)/du du, [B, K, C, H, W]; and (d^2(K L)/du dx)^T c, [B, C, H, W], for images in [0, 1].
        """
        smoothing = max(l1_smoothing, self.settings.l1_smoothing)
        products, to_all = [], torch.zeros_like(self.images)
        parts = latent_chunks(latents, self.class_labels, self._second)
        directions = along.flatten(0, 1).split(self._second)
        for (part, *labels), owners, direction in zip(parts, self._owners.split(self._second), directions, strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                images = self.images[owners].requires_grad_(mixed)
                generated = self._generated(self.generate, leaf, images, *labels)
                l1, ssim = perceptual_terms(generated, SSIMReference.of(images), smoothing, self.settings.tolerance)
                loss = (l1 - self.settings.ssim_weight * ssim).sum()
                (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True, allow_unused=True)
                if gradient is None:
                    raise BackboneError.without_graph("latents")
                wanted = (leaf, images) if mixed else (leaf,)
                product, *to_images = torch.autograd.grad(gradient, wanted, direction, materialize_grads=True)
            products.append(product)
            if mixed:
                to_all.index_add_(0, owners, to_images[0])
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            (pull,) = torch.autograd.grad(self._latent_weight * latent_term(leaf).sum(), leaf, create_graph=True)
            (product,) = torch.autograd.grad(pull, leaf, along)
        return torch.cat(products).view_as(latents) + product, to_all

    def images_of(self, latents: Tensor) -> Tensor:
        """G(u), [B, K, C, H, W] in [-1, 1], of latents [B, K, C, H, W], without a graph."""
        with torch.no_grad():
            chunks = latent_chunks(latents, self.class_labels, self.chunk, self.inputs)
            return torch.cat([self.generate(*given) for given in chunks]).to(latents.dtype).unflatten(0, self.shape)

    def _terms(self, generated: Tensor, reference: SSIMReference) -> tuple[Tensor, Tensor]:
        """``perceptual_terms`` with the settings' constants, for first derivatives."""
        smoothing, tolerance = self.settings.l1_smoothing, self.settings.tolerance
        if self.fast_terms is None:
            return perceptual_terms(generated, reference, smoothing, tolerance)
        of_images = (reference.images, reference.mean, reference.variance)
        filters = {"rows": reference.rows, "columns": reference.columns}
        l1, ssim = self.fast_terms(generated, *of_images, smoothing, tolerance, **filters).unbind(dim=1)
        return l1, ssim

    @property
    def _latent_weight(self) -> float:
        return self.shape[1] * self.settings.latent_weight

    @property
    def inputs(self) -> Tensor | None:
        """The images, where those of latents depend on them; None without a level."""
        return None if self.settings.level is None else self.images

    def _generated(self, generate: Generate, latents: Tensor, images: Tensor, *labels: Tensor) -> Tensor:
        """The images of latents in their precision, or a ``BackboneError``."""
        given = labels if self.settings.level is None else (images, *labels)
        generated = generate(latents, *given)
        if not isinstance(generated, Tensor) or generated.shape != latents.shape:
            came = list(generated.shape) if isinstance(generated, Tensor) else type(generated).__name__
            raise BackboneError(f"The backbone must return images shaped {list(latents.shape)}, but returned {came}.")
        if not generated.requires_grad:
            raise BackboneError.without_graph("latents")
        return generated.to(latents.dtype)


def stacked_terms(
    generated: Tensor,
    images: Tensor,
    mean: Tensor,
    variance: Tensor,
    l1_smoothing: float,
    tolerance: float,
    *,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """``perceptual_terms`` as a function of tensors to one tensor [M, 2], as ``StepCompiler`` takes it."""
    reference = SSIMReference(images, mean, variance, rows, columns)
    return torch.stack(perceptual_terms(generated, reference, l1_smoothing, tolerance), dim=1)


def objective_terms(
    latents: Tensor,
    generated: Tensor,
    images: Tensor,
    settings: CMAPSettings,
    *,
    l1_smoothing: float | None = None,
) -> ObjectiveTerms:
    """The terms of eq. 9, differentiable in latents, generated images and images.

    Args:
        latents: [B, K, C, H, W].
        generated: G of them, [B, K, C, H, W] in [-1, 1].
        images: [B, C, H, W] in [0, 1].
        settings: the constants.
        l1_smoothing: of L1; None for the settings'.
    """
    smoothing = settings.l1_smoothing if l1_smoothing is None else l1_smoothing
    owners = torch.arange(len(images), device=images.device).repeat_interleave(latents.shape[1])
    shape = latents.shape[:2]
    with torch.autocast(images.device.type, enabled=False):  # as in the loop
        reference = SSIMReference.of(images).take(owners)
        l1, ssim = perceptual_terms(generated.flatten(0, 1), reference, smoothing, settings.tolerance)
        return combine_terms(l1.view(shape), ssim.view(shape), latent_term(latents), settings)


def latent_chunks(
    latents: Tensor, class_labels: Tensor | None, max_parallel: int | None, inputs: Tensor | None = None
) -> list[tuple[Tensor, ...]]:
    """The arguments of ``Generate``, chunk by chunk, ``max_parallel`` latents in each, or all.

    They are the latents [m, C, H, W], and where there are some, the images [m, C, H, W] of ``inputs`` [B, C, H, W] that
    theirs depend on, and their labels [m].
    """
    size = max_parallel or max(1, latents.shape[0] * latents.shape[1])
    given = [latents.flatten(0, 1)]
    if inputs is not None:
        given.append(inputs.repeat_interleave(latents.shape[1], dim=0))
    if class_labels is not None:
        given.append(class_labels.flatten())
    return list(zip(*(part.split(size) for part in given), strict=True))


def around_inputs(denoise: Callable[..., Tensor], level: float) -> Generate:
    """The generator of latents at a noise level around their inputs: clip(f(x' + s u, s), -1, 1), x' = 2 x - 1.

    Args:
        denoise: f, of noisy images [M, C, H, W] in units of [-1, 1], the level, and class labels where there are some.
        level: s, above 0.
    """

    def generate(latents: Tensor, inputs: Tensor, *class_labels: Tensor) -> Tensor:
        return denoise(2 * inputs - 1 + level * latents, level, *class_labels).clamp(-1, 1)

    return generate
