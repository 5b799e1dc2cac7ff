"""Eq. 9 of one batch as a function of its latents and its images, with first and second derivatives, in chunks.

The loop, the gradients through it and attacks on the latents all work on this one object, so none of them sees another
objective than the others. What the derivatives are taken of is K L, the sum over the K latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cmap_defense.cmap.losses import ObjectiveTerms, combine_terms, latent_term, perceptual_terms
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.errors import BackboneError, InputValueError

__all__ = ["Generate", "LatentObjective", "generate_in_chunks", "objective_terms"]

Generate = Callable[..., Tensor]
"""Unit latents [M, C, H, W], and where there are class labels those [M], to images [M, C, H, W] in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Some of the B K latents of a batch: which images they belong to, and their class labels."""

    owners: Tensor
    labels: tuple[Tensor, ...]
    reference: SSIMReference


class LatentObjective:
    """L of eq. 9 for images [B, C, H, W] and their K latents.

    Args:
        generate: the generator G; gradients must flow from its output to its input.
        images: [B, C, H, W] in [0, 1], float32 or float64, detached.
        n_latents: K.
        settings: the constants.
        class_labels: [B, K] integers, each handed to ``generate`` along with its latent; None for none.
        max_parallel: latents per call of ``generate``; None for all B K at once. It changes memory, not the result
            beyond rounding.

    Raises:
        InputValueError: the labels do not fit.
    """

    def __init__(
        self,
        generate: Generate,
        images: Tensor,
        n_latents: int,
        settings: CMAPSettings,
        *,
        class_labels: Tensor | None = None,
        max_parallel: int | None = None,
    ) -> None:
        self.generate = generate
        self.images = images.detach()
        self.settings = settings
        self.shape = (len(images), n_latents)
        self.class_labels = class_labels
        if class_labels is not None and tuple(class_labels.shape) != self.shape:
            raise InputValueError(
                f"Class labels must be [B, K] = {list(self.shape)}, but are {list(class_labels.shape)}."
            )
        self.chunk = max_parallel or max(1, math.prod(self.shape))
        reference = SSIMReference.of(self.images)
        owners = torch.arange(len(images), device=images.device).repeat_interleave(n_latents)
        labels = [()] * len(owners.split(self.chunk))
        if class_labels is not None:
            labels = [(piece,) for piece in class_labels.flatten().split(self.chunk)]
        self._chunks = [
            _Chunk(own, piece, reference.take(own)) for own, piece in zip(owners.split(self.chunk), labels, strict=True)
        ]

    def gradient(self, latents: Tensor, *, keep_images: bool = False) -> tuple[ObjectiveTerms, Tensor, Tensor]:
        """The terms at latents [B, K, C, H, W], d(K L)/du, and G(u) where ``keep_images``; all without a graph.

        Raises:
            BackboneError: ``generate`` returned another shape, or something without a gradient.
        """
        l1s, ssims, gradients, kept = [], [], [], []
        for piece, chunk in self._pieces(latents):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                generated = self._generated(leaf, chunk)
                l1, ssim = perceptual_terms(generated, chunk.reference, self.settings.l1_smoothing)
                loss = (l1 - self.settings.ssim_weight * ssim).sum()
                (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
            if gradient is None:
                raise _detached()
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
        for (piece, chunk), part in zip(self._pieces(latents), along.flatten(0, 1).split(self.chunk), strict=True):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                images = self.images[chunk.owners].requires_grad_(mixed)
                generated = self._generated(leaf, chunk)
                l1, ssim = perceptual_terms(generated, SSIMReference.of(images), smoothing)
                loss = (l1 - self.settings.ssim_weight * ssim).sum()
                (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True, allow_unused=True)
                if gradient is None:
                    raise _detached()
                wanted = (leaf, images) if mixed else (leaf,)
                product, *to_images = torch.autograd.grad(gradient, wanted, part, materialize_grads=True)
            products.append(product)
            if mixed:
                to_all.index_add_(0, chunk.owners, to_images[0])
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            (pull,) = torch.autograd.grad(self._latent_weight * latent_term(leaf).sum(), leaf, create_graph=True)
            (product,) = torch.autograd.grad(pull, leaf, along)
        return torch.cat(products).view_as(latents) + product, to_all

    @property
    def _latent_weight(self) -> float:
        return self.shape[1] * self.settings.latent_weight

    def _pieces(self, latents: Tensor) -> Iterator[tuple[Tensor, _Chunk]]:
        return zip(latents.flatten(0, 1).split(self.chunk), self._chunks, strict=True)

    def _generated(self, latents: Tensor, chunk: _Chunk) -> Tensor:
        """G in the latents' precision, or a :class:`BackboneError`."""
        generated = self.generate(latents, *chunk.labels)
        if not isinstance(generated, Tensor) or generated.shape != latents.shape:
            came = list(generated.shape) if isinstance(generated, Tensor) else type(generated).__name__
            raise BackboneError(
                f"The backbone's generate must return images shaped {list(latents.shape)}, but returned {came}."
            )
        if not generated.requires_grad:
            raise _detached()
        return generated.to(latents.dtype)


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
    l1, ssim = perceptual_terms(generated.flatten(0, 1), SSIMReference.of(images).take(owners), smoothing)
    shape = latents.shape[:2]
    return combine_terms(l1.view(shape), ssim.view(shape), latent_term(latents), settings)


def generate_in_chunks(
    generate: Generate, latents: Tensor, max_parallel: int | None, class_labels: Tensor | None = None
) -> Tensor:
    """G of latents [B, K, C, H, W], without a graph: [B, K, C, H, W] in [-1, 1]."""
    flat = latents.flatten(0, 1)
    chunk = max_parallel or max(1, len(flat))
    labels = [()] * len(flat.split(chunk))
    if class_labels is not None:
        labels = [(piece,) for piece in class_labels.flatten().split(chunk)]
    with torch.no_grad():
        pieces = [generate(piece, *given) for piece, given in zip(flat.split(chunk), labels, strict=True)]
    return torch.cat(pieces).to(latents.dtype).unflatten(0, latents.shape[:2])


def _detached() -> BackboneError:
    return BackboneError(
        "The backbone's generate returned images that do not depend on the latents for autograd. "
        "Remove torch.no_grad, torch.inference_mode and detach from it."
    )
