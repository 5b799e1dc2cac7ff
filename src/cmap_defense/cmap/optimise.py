"""Algorithm 1 of arXiv 2412.08394: N Adam steps on the latents, as a pure function.

The loop knows a ``generate`` function, images and latents; no modules, devices or seeds. It minimises K L, the sum
over the K latents, so that Adam's eps means the same for every K. Latents and losses keep the latents' precision;
``generate`` may run in another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmap_defense.cmap.adam import AdamState, adam_step
from cmap_defense.cmap.losses import ObjectiveTerms, combine_terms, latent_term, perceptual_terms
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.errors import BackboneError, InputValueError
from cmap_defense.results import History

__all__ = ["Callback", "Generate", "LatentState", "generate_in_chunks", "optimise_latents"]

Generate = Callable[..., Tensor]
"""Unit latents [M, C, H, W], and where there are class labels those [M], to images [M, C, H, W] in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class LatentState:
    """What a callback sees: iteration n before its step. All tensors are detached; they are the loop's own, so do not
    change them in place: return new latents instead.

    iteration: n, from 0. latents: [B, K, C, H, W], unit. generated: G(latents), [B, K, C, H, W] in [-1, 1].
    terms: the objective there. images: the inputs [B, C, H, W] in [0, 1].
    image_indices: [B] on the CPU, the position of each image in the caller's batch.
    """

    iteration: int
    latents: Tensor
    generated: Tensor
    terms: ObjectiveTerms
    images: Tensor
    image_indices: Tensor


Callback = Callable[[LatentState], "Tensor | None"]
"""Called before every step; latents that it returns take the place of the state's and are evaluated afresh;
Adam keeps its moments."""


def optimise_latents(
    generate: Generate,
    images: Tensor,
    latents: Tensor,
    settings: CMAPSettings,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    max_parallel: int | None = None,
) -> tuple[Tensor, History]:
    """Minimise eq. 9 over the latents of every image.

    Args:
        generate: the generator G; gradients must flow from its output to its input.
        images: [B, C, H, W] in [0, 1].
        latents: [B, K, C, H, W], where to start; unit, float32 or float64.
        settings: the constants.
        class_labels: [B, K] integers, each handed to ``generate`` along with its latent; None for none.
        callback: see :data:`Callback`.
        max_parallel: latents per call of ``generate``; None for all B K at once. It changes memory, not the result
            beyond rounding.

    Returns:
        The latents after N steps, and the :class:`History` of the N evaluations before each step.

    Raises:
        InputValueError: images and latents do not fit each other.
        BackboneError: ``generate`` returned another shape, something without a gradient, or values that are not finite.
    """
    if (
        latents.ndim != 5
        or images.ndim != 4
        or latents.shape[0] != images.shape[0]
        or latents.shape[2:] != images.shape[1:]
    ):
        raise InputValueError(
            "Latents must be [B, K, C, H, W] for images [B, C, H, W], "
            f"but are {list(latents.shape)} for {list(images.shape)}."
        )
    latents = latents.detach()
    images = images.detach().to(latents.dtype)
    if class_labels is not None and class_labels.shape != latents.shape[:2]:
        raise InputValueError(
            f"Class labels must be [B, K] = {list(latents.shape[:2])}, but are {list(class_labels.shape)}."
        )
    evaluate = _Evaluation(generate, images, latents.shape[1], settings, class_labels, max_parallel)
    indices = torch.arange(len(images), device="cpu")
    adam = AdamState.start(latents)
    rows: list[tuple[Tensor, ...]] = []
    for iteration in range(settings.iterations):
        terms, gradient, generated = evaluate(latents, keep_images=callback is not None)
        if callback is not None:
            replaced = callback(LatentState(iteration, latents, generated, terms, images, indices))
            if replaced is not None:
                latents = _check_replaced(replaced, latents)
                terms, gradient, _ = evaluate(latents, keep_images=False)
        rows.append(_history_row(terms, latents))
        latents, adam = adam_step(latents, gradient, adam, settings)
    history = History(*(torch.stack(column) for column in zip(*rows, strict=True)))
    if not (torch.isfinite(history.total).all() and torch.isfinite(latents).all()):
        raise BackboneError(
            "The backbone's images or their gradients became NaN or infinite during the optimisation. "
            "A backbone in float16 overflows easily: use bfloat16 or float32."
        )
    return latents, history


def generate_in_chunks(
    generate: Generate, latents: Tensor, max_parallel: int | None, class_labels: Tensor | None = None
) -> Tensor:
    """G of latents [B, K, C, H, W], without a graph: [B, K, C, H, W] in [-1, 1]. class_labels: [B, K] or None."""
    chunk = max_parallel or max(1, latents.shape[0] * latents.shape[1])
    with torch.no_grad():
        pieces = [
            generate(piece, *labels)
            for piece, labels in zip(
                latents.flatten(0, 1).split(chunk), _label_chunks(class_labels, latents.shape[:2], chunk), strict=True
            )
        ]
    return torch.cat(pieces).to(latents.dtype).unflatten(0, latents.shape[:2])


def _label_chunks(class_labels: Tensor | None, shape: Sequence[int], chunk: int) -> list[tuple[Tensor, ...]]:
    """For each chunk of the flattened latents, what ``generate`` is given besides: its labels, or nothing."""
    if class_labels is None:
        return [()] * max(1, math.ceil(shape[0] * shape[1] / chunk))
    return [(piece,) for piece in class_labels.flatten().split(chunk)]


class _Evaluation:
    """Eq. 9 and the gradient of K L for one set of images; what does not change over the iterations is kept."""

    def __init__(
        self,
        generate: Generate,
        images: Tensor,
        n_latents: int,
        settings: CMAPSettings,
        class_labels: Tensor | None,
        max_parallel: int | None,
    ) -> None:
        self.generate = generate
        self.settings = settings
        reference = SSIMReference.of(images)
        owners = torch.arange(len(images), device=images.device).repeat_interleave(n_latents)
        self.chunk = max_parallel or max(1, len(owners))
        self.references = [reference.take(part) for part in owners.split(self.chunk)]
        self.labels = _label_chunks(class_labels, (len(images), n_latents), self.chunk)

    def __call__(self, latents: Tensor, *, keep_images: bool) -> tuple[ObjectiveTerms, Tensor, Tensor]:
        l1s, ssims, gradients, kept = [], [], [], []
        pieces = latents.flatten(0, 1).split(self.chunk)
        for piece, reference, labels in zip(pieces, self.references, self.labels, strict=True):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                generated = _checked(self.generate(leaf, *labels), leaf)
                l1, ssim = perceptual_terms(generated, reference)
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
            weight = latents.shape[1] * self.settings.latent_weight
            (pull,) = torch.autograd.grad(weight * latent.sum(), leaf)
        shape = latents.shape[:2]
        terms = combine_terms(torch.cat(l1s).view(shape), torch.cat(ssims).view(shape), latent.detach(), self.settings)
        images = torch.cat(kept).unflatten(0, shape) if keep_images else latents.new_empty(0)
        return terms, torch.cat(gradients).view_as(latents) + pull, images


def _history_row(terms: ObjectiveTerms, latents: Tensor) -> tuple[Tensor, ...]:
    elements = latents.flatten(1)
    return (terms.l1.mean(1), terms.ssim.mean(1), terms.latent, terms.total, elements.mean(1), elements.std(1))


def _checked(generated: Tensor, latents: Tensor) -> Tensor:
    """``generated`` in the latents' precision, or a :class:`BackboneError`."""
    if not isinstance(generated, Tensor) or generated.shape != latents.shape:
        came = list(generated.shape) if isinstance(generated, Tensor) else type(generated).__name__
        raise BackboneError(
            f"The backbone's generate must return images shaped {list(latents.shape)}, but returned {came}."
        )
    if not generated.requires_grad:
        raise _detached()
    return generated.to(latents.dtype)


def _detached() -> BackboneError:
    return BackboneError(
        "The backbone's generate returned images that do not depend on the latents for autograd. "
        "Remove torch.no_grad, torch.inference_mode and detach from it."
    )


def _check_replaced(replaced: Tensor, latents: Tensor) -> Tensor:
    if not isinstance(replaced, Tensor) or replaced.shape != latents.shape:
        came = list(replaced.shape) if isinstance(replaced, Tensor) else type(replaced).__name__
        raise InputValueError(
            f"A callback must return None or latents shaped {list(latents.shape)}, but returned {came}."
        )
    return replaced.detach().to(latents)
