"""The consistency function f and its one-step generator G around a raw network F.

Preconditioning of Karras et al. 2022 (arXiv 2206.00364, Table 1) with the boundary condition of Song et al. 2023
(arXiv 2303.01469, eq. 5 and appendix C):

    f(x, s) = c_skip(s) x + c_out(s) F(c_in(s) x, ln(s) / 4),      f(x, sigma_min) = x exactly
    G(u)    = clip(f(sigma_max u, sigma_max), -1, 1)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.common.inputs import check_class_labels
from cmap_defense.common.modules import dtype_of
from cmap_defense.common.settings import Settings, require_number, setting
from cmap_defense.errors import InputValueError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseRange(Settings):
    """Noise levels of a consistency model, in units of images in [-1, 1].

    Attributes:
        sigma_min: level at which f is the identity.
        sigma_max: level of the latents' prior.
        sigma_data: standard deviation of the data that the scalings assume.
    """

    sigma_min: float = setting(0.002, above=0.0)
    sigma_max: float = setting(80.0)
    sigma_data: float = setting(0.5, above=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("NoiseRange", "sigma_max", self.sigma_max, above=self.sigma_min)


def karras_levels(count: int, noise: NoiseRange | None = None, *, rho: float = 7.0) -> list[float]:
    """``count`` noise levels from sigma_min up to sigma_max, dense where they are small (arXiv 2206.00364, eq. 5).

    The paper of CMAP counts them from 1: its level 5 of 18 is ``karras_levels(18)[4]``, 0.1395.
    """
    noise = noise or NoiseRange()
    low, high = noise.sigma_min ** (1 / rho), noise.sigma_max ** (1 / rho)
    return [(low + (high - low) * step / max(1, count - 1)) ** rho for step in range(count)]


def boundary_scalings(sigma: Tensor, *, sigma_data: float, sigma_min: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in at ``sigma`` (any shape, > 0); sigma_min = 0 gives those of the EDM denoiser."""
    data2 = sigma_data**2
    c_skip = 1 / (1 + ((sigma - sigma_min) / sigma_data) ** 2)  # exactly 1 at sigma_min
    c_out = (sigma - sigma_min) * sigma_data / (sigma**2 + data2).sqrt()
    c_in = (sigma**2 + data2).rsqrt()
    return c_skip, c_out, c_in


class KarrasModel(nn.Module):
    """A network with scalings around it; the base of the two models below.

    Args:
        network: maps [B, C, H, W] scaled input and [B] noise levels ln(sigma) / 4 (float32 at least), and for a
            class-conditional model [B] labels, to [B, C, H, W].
        image_shape: (C, H, W) of the images and of the latents.
        noise: the noise levels that the network was trained for.
        num_classes: of a class-conditional model; None for an unconditional one.

    Attributes:
        kind: "consistency" or "denoiser".
        record: what is known about it, when it came from a folder.
        accepts_any_float: inputs of any float dtype are cast before the network, so callers keep theirs in float32.
    """

    kind: str = ""
    accepts_any_float = True

    def __init__(
        self,
        network: nn.Module,
        image_shape: tuple[int, int, int],
        noise: NoiseRange | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.image_shape = image_shape
        self.noise = noise or NoiseRange()
        self.num_classes = num_classes
        self.record: BackboneRecord | None = None

    def denoise(self, noisy: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """c_skip x + c_out F(c_in x, ln(sigma) / 4), not clipped: the estimate of the clean image behind ``noisy``.

        Args:
            noisy: x, [B, C, H, W] = image in [-1, 1] plus sigma times unit noise.
            sigma: noise level, a number or [B], positive; it was trained for those from sigma_min to sigma_max.
            class_labels: [B] integers for a class-conditional model, None for another.

        Returns:
            [B, C, H, W], close to [-1, 1]; of a consistency model exactly ``noisy`` where sigma = sigma_min. The
            scalings are computed in float32 at least, or the input's precision, the network in its own.

        Raises:
            InputValueError: labels are missing or out of range, or sigma is no noise level.
            InputTypeError: labels are no integers.
        """
        labels = check_class_labels(class_labels, len(noisy), self.num_classes, ranged=False)
        x = noisy.to(torch.promote_types(noisy.dtype, torch.float32))
        level = _levels(sigma, x)
        scalings = getattr(self.network, "scalings", boundary_scalings)  # a network that was trained with others has it
        broadcast = level[:, None, None, None]
        c_skip, c_out, c_in = scalings(broadcast, sigma_data=self.noise.sigma_data, sigma_min=self._identity_level)
        scaled = (c_in * x).to(dtype_of(self.network) or x.dtype)
        raw = self.network(scaled, level.log() / 4, *(() if labels is None else (labels,)))
        return c_skip * x + c_out * raw.to(x.dtype)

    @property
    def _identity_level(self) -> float:
        """The noise level at which the model is the identity, whatever its network."""
        return 0.0


def _levels(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Noise levels [B] in the precision and on the device of x. Those on a GPU are not checked: that makes it wait."""
    level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if level.shape not in ((), x.shape[:1]):
        raise InputValueError(f"sigma must be a number or [{len(x)}], but is {list(level.shape)}.")
    positive = sigma.is_cuda or bool((sigma > 0).all()) if isinstance(sigma, Tensor) else sigma > 0
    if not positive:
        raise InputValueError(f"sigma must be positive, but is {sigma}.")
    return level.expand(x.shape[0])


class ConsistencyBackbone(KarrasModel):
    """A consistency model: any network F(x, noise_level) with the scalings around it.

    Its arguments are those of ``KarrasModel``. Outputs have the input's precision, float32 at least.

    Attributes:
        default_settings: the CMAP settings that its record names.
    """

    kind = "consistency"
    default_settings: dict[str, Any] | None = None

    def generate(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """G(u): one-step images in [-1, 1] from unit latents [B, C, H, W]. No gradient flows where the clip acts."""
        return self.denoise(self.noise.sigma_max * latents, self.noise.sigma_max, class_labels).clamp(-1, 1)

    @property
    def _identity_level(self) -> float:
        return self.noise.sigma_min


class EDMDenoiser(KarrasModel):
    """A denoiser D(x, sigma): the scalings with sigma_min = 0 (arXiv 2206.00364, eq. 7).

    For purifiers that add noise and denoise: ``denoise`` is the mean of all clean images behind the noisy one. It has
    no one-step generator, so CMAP needs a level for it. Its arguments are those of ``KarrasModel``.
    """

    kind = "denoiser"

    def score(self, noisy: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """The gradient of the log density at noise level sigma: (D(x, sigma) - x) / sigma^2 (eq. 3 there)."""
        level = torch.as_tensor(sigma, dtype=torch.promote_types(noisy.dtype, torch.float32), device=noisy.device)
        return (self.denoise(noisy, sigma, class_labels) - noisy) / level.expand(len(noisy))[:, None, None, None] ** 2
