"""What can be trained: the two views of a network."""

from __future__ import annotations

from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser

__all__ = ["MODELS", "Model"]

Model = ConsistencyBackbone | EDMDenoiser

MODELS: dict[str, type[ConsistencyBackbone] | type[EDMDenoiser]] = {
    "consistency": ConsistencyBackbone,
    "denoiser": EDMDenoiser,
}
"""Kind of an objective -> what it trains."""
