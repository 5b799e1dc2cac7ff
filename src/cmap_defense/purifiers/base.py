"""What every purification defence looks like from outside."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from cmap_defense.cmap.optimise import Callback
from cmap_defense.results import PurificationResult

__all__ = ["Purifier"]


class Purifier(Protocol):
    """Frozen settings plus a call; it owns no weights.

    One that is an optimisation over latents has ``prepare`` besides, which gradient modes that differentiate the
    optimisation ask for; see :class:`~cmap_defense.purifiers.cmap.CMAP`.
    """

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
        """Purify images [B, C, H, W] in [0, 1] of the backbone's size; no gradient to them, no classifier.

        class_labels: [B, K] integers for a class-conditional backbone, None for another.
        """
        ...
