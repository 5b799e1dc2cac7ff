"""One-step purification: add noise, denoise once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmap_defense.backbones.base import caster
from cmap_defense.cmap.memory import default_max_parallel
from cmap_defense.cmap.optimise import Callback
from cmap_defense.errors import BackboneError
from cmap_defense.purifiers.base import Purifier, require_level
from cmap_defense.results import PurificationResult
from cmap_defense.rng import draw_latents
from cmap_defense.settings import Settings, require_integer, require_number

__all__ = ["OneStep"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStep(Settings, Purifier):
    """x -> clip(D(x' + level e, level), -1, 1), x' = 2 x - 1, e ~ N(0, I), K times with independent noise.

    D is the consistency function (Song et al. 2023, arXiv 2303.01469, eq. 5) or a denoiser (Karras et al. 2022, arXiv
    2206.00364, eq. 7). It is the cheapest purification there is: what takes longer has to be better than this one.
    Its exact gradient, ``gradient=Unrolled()``, costs one backward pass of the network for each of the K.

    Args:
        level: standard deviation of the noise, in units of images in [-1, 1]; 0 gives the input back.
        n_latents: K, the purified versions of an image.

    Raises:
        SettingsError: a value is out of its range.
    """

    needs: ClassVar[str] = "denoise"

    level: float = 0.5
    n_latents: int = 4  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __post_init__(self) -> None:
        require_number("OneStep", "level", self.level, minimum=0.0)
        require_integer("OneStep", "n_latents", self.n_latents, minimum=1)

    @property
    def passes(self) -> int:
        return self.n_latents if self.level else 0

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
        """Purify images; differentiable. Arguments: :class:`~cmap_defense.purifiers.base.Purifier`.

        Raises:
            SettingsError: the backbone was not trained for noise as strong as ``level``.
            BackboneError: the backbone's images have another shape than their input.
        """
        require_level(backbone, "OneStep", self.level)
        dtype = torch.promote_types(images.dtype, torch.float32)
        images = images.to(dtype)
        noise = draw_latents(seeds, self.n_latents, images.shape[1:]) if latents is None else latents.detach()
        noise = noise.to(images.device, dtype)
        given = None if latents is not None else seeds
        if not self.level:
            unchanged = images[:, None].expand(noise.shape)
            return PurificationResult(unchanged, noise, seeds=given, class_labels=class_labels)
        denoise = functools.partial(_denoised, caster(backbone, images.device, "denoise"), self.level)
        noisy = ((2 * images - 1)[:, None] + self.level * noise).flatten(0, 1)
        if max_parallel is None and len(noisy):
            conditional = class_labels is not None
            max_parallel = default_max_parallel(
                denoise, images.shape[1:], images.device, conditional=conditional, owner=backbone
            )
        size = max_parallel or 1
        labels = [] if class_labels is None else [class_labels.flatten().split(size)]
        chunks = list(zip(noisy.split(size), *labels, strict=True))
        with torch.autocast(images.device.type, enabled=False):
            if len(chunks) > 1 and noisy.requires_grad and torch.is_grad_enabled():  # the graph of one chunk at a time
                clean = torch.cat([checkpoint(denoise, *chunk, use_reentrant=False) for chunk in chunks])
            else:
                clean = torch.cat([denoise(*chunk) for chunk in chunks])
        if clean.shape != noisy.shape:
            raise BackboneError(f"denoise must return {list(noisy.shape)}, but returned {list(clean.shape)}.")
        purified = (clean.to(dtype).clamp(-1, 1) + 1) / 2
        return PurificationResult(purified.unflatten(0, noise.shape[:2]), noise, seeds=given, class_labels=class_labels)


def _denoised(denoise: Callable[..., Tensor], level: float, noisy: Tensor, *class_labels: Tensor) -> Tensor:
    return denoise(noisy, level, *class_labels)
