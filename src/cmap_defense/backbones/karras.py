"""The consistency function f and its one-step generator G around a raw network F.

Preconditioning of Karras et al. 2022 (arXiv 2206.00364, Table 1) with the boundary condition of Song et al. 2023
(arXiv 2303.01469, eq. 5 and appendix C)::

    f(x, s) = c_skip(s) x + c_out(s) F(c_in(s) x, ln(s) / 4),      f(x, sigma_min) = x exactly
    G(u)    = clip(f(sigma_max u, sigma_max), -1, 1)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.modules import dtype_of
from cmap_defense.settings import Settings, require_number

__all__ = ["ConsistencyBackbone", "NoiseRange", "boundary_scalings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseRange(Settings):
    """Noise levels of a consistency model, in units of images in [-1, 1].

    sigma_min: level at which f is the identity. sigma_max: level of the latents' prior.
    sigma_data: standard deviation of the data that the scalings assume.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require_number("NoiseRange", "sigma_min", self.sigma_min, above=0.0)
        require_number("NoiseRange", "sigma_max", self.sigma_max, above=self.sigma_min)
        require_number("NoiseRange", "sigma_data", self.sigma_data, above=0.0)


def boundary_scalings(sigma: Tensor, *, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in at ``sigma`` (any shape, > 0); sigma_min = 0 gives those of the EDM denoiser."""
    data2 = sigma_data**2
    c_skip = 1 / (1 + ((sigma - sigma_min) / sigma_data) ** 2)  # exactly 1 at sigma_min
    c_out = (sigma - sigma_min) * sigma_data / (sigma**2 + data2).sqrt()
    c_in = (sigma**2 + data2).rsqrt()
    return c_skip, c_out, c_in


class ConsistencyBackbone(nn.Module):
    """A consistency model: any network F(x, noise_level) with the scalings around it.

    Args:
        network: maps ([B, C, H, W] scaled input, [B] noise levels ln(sigma) / 4) to [B, C, H, W].
        image_shape: (C, H, W) of the images and of the latents.
        noise: the noise levels that the network was trained for.

    record: what is known about it, when it came from a folder. default_settings: the CMAP settings that its record
        names.

    The scalings are computed in float32 (or the input's precision where that is higher); only the network runs in
    its own precision. Outputs have the input's precision, float32 at least.
    """

    accepts_any_float = True
    """Inputs of any float dtype are cast at the network's door, so callers keep their latents in float32."""

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int], noise: NoiseRange | None = None) -> None:
        super().__init__()
        self.network = network
        self.image_shape = image_shape
        self.noise = noise or NoiseRange()
        self.record: BackboneRecord | None = None
        self.default_settings: dict[str, Any] | None = None

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        """f(x, sigma), not clipped: the clean image that the model sees behind ``noisy``.

        Args:
            noisy: [B, C, H, W] = image in [-1, 1] plus sigma times unit noise.
            sigma: noise level, a number or [B].

        Returns:
            [B, C, H, W], close to [-1, 1]; exactly ``noisy`` where sigma = sigma_min.
        """
        wide = torch.promote_types(noisy.dtype, torch.float32)
        x = noisy.to(wide)
        level = torch.as_tensor(sigma, dtype=wide, device=x.device).expand(x.shape[0])
        c_skip, c_out, c_in = boundary_scalings(
            level[:, None, None, None], sigma_data=self.noise.sigma_data, sigma_min=self.noise.sigma_min
        )
        inner = dtype_of(self.network) or wide
        raw = self.network((c_in * x).to(inner), (level.log() / 4).to(inner))
        return c_skip * x + c_out * raw.to(wide)

    def generate(self, latents: Tensor) -> Tensor:
        """G(u): one-step images in [-1, 1] from unit latents [B, C, H, W]. No gradient flows where the clip acts."""
        return self.denoise(self.noise.sigma_max * latents, self.noise.sigma_max).clamp(-1, 1)
