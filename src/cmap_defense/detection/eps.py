"""The expected perturbation score: the mean score of an image over small noise levels (S. Zhang et al. 2023, arXiv
2305.16035; Fig. 1 of arXiv 2412.08394):

    EPS(x) = (1/T) sum_t score(x_t, sigma_t),     x_t = x' + sigma_t n_t,     score(x_t, s) = (D(x_t, s) - x_t) / s^2

with x' = 2x - 1, one fresh noise n_t ~ N(0, I) for each level and image, and a denoiser D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmap_defense.backbones.base import caster
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.inputs import (
    check_class_labels,
    check_finite,
    check_images,
    check_indices,
    check_shape,
    check_unit_range,
)
from cmap_defense.common.modules import device_of, evaluating
from cmap_defense.common.rng import derived_seeds, draw_latents
from cmap_defense.common.settings import Settings, require_integer, setting
from cmap_defense.errors import BackboneError, InputValueError, SettingsError

EPS_NOISE = 0xE95
"""Separates this noise from all other that an image's index gives."""


def vp_sigmas(levels: int = 20) -> tuple[float, ...]:
    """The first T of the noise levels of a DDPM (Ho et al. 2020, arXiv 2006.11239), as standard deviations sigma.

    There, x_t = sqrt(abar_t) x + sqrt(1 - abar_t) n (variance preserving) with abar_t = prod_{s<=t} (1 - beta_s) and
    1000 betas that rise linearly from 1e-4 to 0.02. Here noise is added to images that keep their scale, so x_t is
    divided by sqrt(abar_t): sigma_t = sqrt((1 - abar_t) / abar_t). The score of the density there is ours divided by
    sqrt(abar_t). That factor is left out; it is below 1.003 for T = 20 and below 1.02 for T = 50.

    Args:
        levels: T; 20 for CIFAR-10 and 50 for ImageNet in the paper. sigma is 0.010 to 0.076, and to 0.173 for T = 50.

    Raises:
        SettingsError: T is not from 1 to 1000.
    """
    require_integer("vp_sigmas", "levels", levels, minimum=1, below=1001)
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")).cumprod(0)[:levels]
    return tuple(((1 - kept) / kept).sqrt().tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class EPS(Settings):
    """The expected perturbation score: settings when made, ``eps(backbone, images)`` when called.

    D is the backbone's ``denoise``. That of an EDM denoiser is the mean of the clean images behind x_t, and the score
    is exact where the network is. That of a consistency model is the end of the path of the probability flow. For
    normally distributed data it gives half the score in directions in which sigma is far below their standard
    deviation, and the whole where it is far above, as for noise off the data manifold.

    Args:
        sigmas: noise levels for images in [-1, 1]; the default is the paper's for CIFAR-10, see ``vp_sigmas``.
        seed: of the noise, which belongs to (seed, image index, level): the first T levels of an image have the same
            noise in every longer list.

    Raises:
        SettingsError: there is no level, or one that is not a positive number.
    """

    sigmas: tuple[float, ...] = setting(vp_sigmas(), above=0.0)
    seed: int = setting(0, minimum=-(2**63))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigmas:
            raise SettingsError("EPS.sigmas must be one or more positive numbers, but is ().")

    def noise(self, indices: Tensor, image_shape: Sequence[int]) -> Tensor:
        """n_t of images with these indices, int64 [B]: float32 [B, T, C, H, W] on the CPU."""
        seeds = derived_seeds(derived_seeds(indices, EPS_NOISE), self.seed)
        return draw_latents(seeds, len(self.sigmas), image_shape)

    def __call__(
        self,
        backbone: nn.Module,
        images: Tensor,
        *,
        indices: Tensor | Sequence[int] | None = None,
        class_labels: Tensor | None = None,
        max_parallel: int = 64,
    ) -> Tensor:
        """EPS of every image, without gradients.

        Args:
            backbone: with ``image_shape`` and ``denoise(noisy, sigma)`` in units of [-1, 1], in eval mode.
            images: float [B, C, H, W] in [0, 1], anywhere; they are brought to the backbone in chunks.
            indices: [B] integers, which image of the data set each one is; None for 0, 1, ... The noise depends on it.
            class_labels: [B] integers for a class-conditional backbone, None for another.
            max_parallel: images in one call of the backbone. It changes memory, not the result beyond rounding.

        Returns:
            [B, C, H, W], float32 or the images' precision where that is higher, where the images are. In units of
            1 / (images in [-1, 1]).

        Raises:
            BackboneError: there is no ``denoise``, or it returned something else than finite images.
            InputTypeError: the images are of another type.
            InputValueError: their shape or values are not as above, or the backbone was not trained for a noise level.
        """
        if not hasattr(backbone, "denoise"):
            raise BackboneError(
                f"EPS needs backbone.denoise(noisy, sigma), but {type(backbone).__name__} has none: "
                "use a ConsistencyBackbone or an EDMDenoiser."
            )
        check_finite(check_images(images))
        check_unit_range(images)
        check_shape(images, backbone.image_shape, resizes=False)  # pyright: ignore[reportArgumentType]
        require_integer("EPS", "max_parallel", max_parallel, minimum=1)
        noise = getattr(backbone, "noise", None)
        outside = [s for s in self.sigmas if noise is not None and not noise.sigma_min <= s <= noise.sigma_max]
        if noise is not None and outside:
            raise InputValueError(
                f"The backbone was trained for noise from {noise.sigma_min:g} to {noise.sigma_max:g}, but EPS.sigmas "
                f"has {outside[0]:g}: give EPS(sigmas=...) within that range."
            )
        index = check_indices(indices, len(images))
        labels = check_class_labels(class_labels, len(images), getattr(backbone, "num_classes", None))
        device = device_of(backbone) or images.device
        denoise = caster(backbone, device, "denoise")
        with torch.inference_mode(False), torch.no_grad(), evaluating(backbone):
            images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
            scores = [images[:0].clone()]
            for rows in torch.arange(len(images), device="cpu").split(max_parallel):
                given = () if labels is None else (labels[rows.to(labels.device)].to(device),)
                clean = 2 * images[rows.to(images.device)].to(device) - 1
                noise = self.noise(index[rows], images.shape[1:]).to(clean)
                total = torch.zeros_like(clean)
                for sigma, drawn in zip(self.sigmas, noise.unbind(dim=1), strict=True):
                    noisy = clean + sigma * drawn
                    total += (_checked(denoise(noisy, sigma, *given), noisy) - noisy) / sigma**2
                scores.append((total / len(self.sigmas)).to(images.device))
            return torch.cat(scores)


def _checked(denoised: Tensor, noisy: Tensor) -> Tensor:
    if not isinstance(denoised, Tensor) or denoised.shape != noisy.shape:
        came = list(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
        raise BackboneError(f"backbone.denoise must return {list(noisy.shape)}, but returned {came}.")
    denoised = denoised.to(noisy)
    if not torch.isfinite(denoised).all():
        raise BackboneError("backbone.denoise returned NaN or infinite values: use it in bfloat16 or float32.")
    return denoised


def model_scores(model: PurifiedClassifier, eps: EPS, images: Tensor, indices: Tensor, max_parallel: int) -> Tensor:
    """EPS of images [B, C, H, W] in [0, 1] with the noise of these indices [B], for a model's backbone, resized to it,
    under the classes that the model chooses."""
    scores = []
    for rows in torch.arange(len(images), device="cpu").split(max_parallel):
        part = images[rows].to(torch.promote_types(images.dtype, torch.float32))
        with torch.no_grad():
            conditions = model.latent_class_labels(part)
            small = model.preprocessing.resized(part, model.image_shape[1:])
        labels = None if conditions is None else conditions[:, 0]
        scores.append(eps(model.backbone, small, indices=indices[rows], class_labels=labels, max_parallel=max_parallel))
    return torch.cat(scores)
