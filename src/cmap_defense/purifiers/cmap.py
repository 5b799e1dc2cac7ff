"""CMAP as a purifier: noise, the latent loop, the K images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmap_defense.backbones.base import latent_caster
from cmap_defense.cmap.memory import default_max_parallel
from cmap_defense.cmap.optimise import Callback, generate_in_chunks, optimise_latents
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.errors import BackboneError
from cmap_defense.results import PurificationResult
from cmap_defense.rng import draw_latents

__all__ = ["CMAP"]

RANGE_TOLERANCE = 1e-2
"""How far outside [-1, 1] a backbone's images may be, for the rounding of half precision."""


class CMAP:
    """Consistency-model adversarial purification (arXiv 2412.08394, algorithm 1 without the classifier)."""

    def __init__(self, settings: CMAPSettings | None = None) -> None:
        self.settings = settings or CMAPSettings()

    def __call__(
        self,
        backbone: nn.Module,
        images: Tensor,
        *,
        seeds: Tensor,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        callback: Callback | None = None,
        max_parallel: int | None = None,
    ) -> PurificationResult:
        """Purify images.

        Args:
            backbone: satisfies the backbone protocol; on the images' device.
            images: [B, C, H, W] in [0, 1], of the backbone's image shape.
            seeds: [B] int64 on the CPU; each image's noise is drawn from its own.
            latents: [B, K, C, H, W], a start in place of the noise.
            class_labels: [B, K] integers for a class-conditional backbone, None for another.
            callback: see :data:`~cmap_defense.cmap.optimise.Callback`.
            max_parallel: latents at once; None for what fits.

        Returns:
            Images [B, K, C, H, W] in [0, 1] and unit latents, float32 or the images' precision where that is higher.
        """
        dtype = torch.promote_types(images.dtype, torch.float32)
        start = draw_latents(seeds, self.settings.n_latents, images.shape[1:]) if latents is None else latents.detach()
        start = start.to(images.device, dtype)
        generate = latent_caster(backbone, images.device)
        with torch.autocast(images.device.type, enabled=False):  # inside, the backbone alone gets the caller's autocast
            if max_parallel is None and start.numel():
                conditional = class_labels is not None
                max_parallel = default_max_parallel(generate, images.shape[1:], images.device, conditional=conditional)
            found, history = optimise_latents(
                generate,
                images.detach().to(dtype),
                start,
                self.settings,
                class_labels=class_labels,
                callback=callback,
                max_parallel=max_parallel,
            )
            generated = generate_in_chunks(generate, found, max_parallel, class_labels)
            if generated.numel() and generated.abs().max() > 1 + RANGE_TOLERANCE:
                raise BackboneError(
                    f"The backbone's generate must return images in [-1, 1], but their largest magnitude is "
                    f"{generated.abs().max().item():.4g}."
                )
            purified = (generated.clamp(-1, 1) + 1) / 2
        return PurificationResult(purified, found, history, None if latents is not None else seeds, class_labels)

    def __repr__(self) -> str:
        return f"CMAP({self.settings})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CMAP) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash((type(self), self.settings))
