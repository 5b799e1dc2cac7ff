"""No purification."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmap_defense.common.settings import Settings
from cmap_defense.purifiers.base import Purifier
from cmap_defense.results import PurificationResult

__all__ = ["Identity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(Settings, Purifier):
    """The input as it is, once: the classifier without a defence, in the frame of one."""

    needs: ClassVar[str | None] = None

    @property
    def n_latents(self) -> int:
        return 1

    @property
    def passes(self) -> int:
        return 0

    def __call__(
        self,
        backbone: nn.Module,
        images: Tensor,
        *,
        seeds: Tensor,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        **options: Any,
    ) -> PurificationResult:
        """The images, float32 at least; there is no noise, so that ``latents`` of the result are 0. Latents that are
        given decide about K alone."""
        same = images.to(torch.promote_types(images.dtype, torch.float32))[:, None]
        same = same if latents is None else same.expand(-1, latents.shape[1], -1, -1, -1)
        return PurificationResult(same, torch.zeros_like(same), seeds=seeds, class_labels=class_labels)
