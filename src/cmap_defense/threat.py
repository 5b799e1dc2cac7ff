"""Threat models: which images an attacker may turn an image into."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cmap_defense.settings import Settings, require_choice, require_number

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ThreatModel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreatModel(Settings):
    """All images in [0, 1] within a distance of the clean one.

    norm: "linf" (largest absolute difference) or "l2" (Euclidean norm over C x H x W). eps: the distance, 0 at least,
    in units of images in [0, 1].
    """

    norm: str = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        require_choice("ThreatModel", "norm", self.norm, ("linf", "l2"))
        require_number("ThreatModel", "eps", self.eps, minimum=0.0)

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """The allowed images near ``images``, [B, C, H, W] each: clamped (linf) or shrunk (l2), then in [0, 1]."""
        import torch  # here, so that the settings alone can be imported without it

        delta = images - clean
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            length = delta.flatten(1).norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
            delta = delta * (self.eps / length).clamp_max(1.0)[:, None, None, None]
        return (clean + delta).clamp(0, 1)

    def distance(self, images: Tensor, clean: Tensor) -> Tensor:
        """[B] distances in this model's norm."""
        delta = (images - clean).flatten(1)
        return delta.abs().amax(dim=1) if self.norm == "linf" else delta.norm(dim=1)
