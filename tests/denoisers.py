"""Denoisers that are known in closed form, a smooth classifier, and every purifier with settings that take no time."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.purifiers import (
    ADP,
    CMAP,
    GDMP,
    GNSP,
    BackbonePair,
    Chain,
    DiffPure,
    Identity,
    LikelihoodMaximisation,
    OneStep,
    Purifier,
)
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
MEAN, SPREAD = 0.1, 0.3
DOUBLE = torch.float64


class GaussianDenoiser(nn.Module):
    """The denoiser of images whose pixels are independent, N(0.1, spread^2) in [-1, 1]: known exactly. Counts images.

    It takes the level as a number or as one for each image.
    """

    def __init__(self, image_shape: tuple[int, int, int] = SHAPE, spread: float = SPREAD) -> None:
        super().__init__()
        self.image_shape, self.spread = image_shape, spread
        self.passes = 0
        self.levels: list[float] = []

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        self.passes += len(noisy)
        self.levels.append(sigma.detach().max().item() if isinstance(sigma, Tensor) else sigma)
        square = torch.as_tensor(sigma, dtype=noisy.dtype, device=noisy.device).reshape(-1, 1, 1, 1) ** 2
        return (self.spread**2 * noisy + square * MEAN) / (self.spread**2 + square)


class CurvedDenoiser(GaussianDenoiser):
    """One whose derivatives depend on the image and on the level, and some of whose outputs lie outside [-1, 1]."""

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        return 1.2 * torch.tanh(1.5 * super().denoise(noisy, sigma) + 0.2 * noisy.flip(-1).sin())


class Classifier(nn.Module):
    """Smooth, four classes."""

    def __init__(self, image_shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        weight = noise(4, math.prod(image_shape), seed=5, dtype=DOUBLE) / 4
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.weight.to(images).T)


CMAP_QUICK = CMAP(CMAPSettings(n_latents=2, iterations=3, learning_rate=0.05, l1_smoothing=0.05))

SINGLE: dict[str, Any] = {
    "one-step": OneStep(level=0.5, n_latents=2),
    "diffpure-sde": DiffPure(t=8, n_latents=2),
    "diffpure-ode": DiffPure(t=8, solver="ode", n_latents=2),
    "diffpure-ddpm": DiffPure(t=8, solver="ddpm", n_latents=2),
    "diffpure-ddpm-posterior": DiffPure(t=8, solver="ddpm", variance="posterior", clip_denoised=False, n_latents=2),
    "gdmp-mse": GDMP(t=5, rounds=2, strength=3000.0, n_latents=2),
    "gdmp-ssim": GDMP(t=4, rounds=2, guide="ssim", strength=3000.0, n_latents=2),
    "gdmp-none": GDMP(t=5, rounds=1, guide="none", n_latents=2),
    "gdmp-respaced": GDMP(t=4, rounds=1, noise_target=False, levels=250, strength=3000.0, n_latents=2),
    "adp": ADP(iterations=4, n_latents=2),
    "gnsp": GNSP(rounds=(3, 5), n_latents=2),
    "gnsp-ddim": GNSP(rounds=(3, 5), eta=0.5, n_latents=2),
    "likelihood": LikelihoodMaximisation(iterations=3, n_latents=2),
}
"""Those that noise and denoise."""

ALL: dict[str, Purifier] = {
    **SINGLE,
    "identity": Identity(),
    "chain": Chain(DiffPure(t=4, n_latents=2), OneStep(level=0.3, n_latents=2)),
    "chain-mean": Chain(OneStep(level=0.3, n_latents=3), ADP(iterations=2, n_latents=2), handed_on="mean"),
    "chain-cmap": Chain(DiffPure(t=3, n_latents=2), CMAP_QUICK),
    "chain-cmap-first": Chain(CMAP_QUICK, DiffPure(t=3), handed_on="mean"),
}


def backbone_for(purifier: Purifier) -> nn.Module:
    """The curved denoiser, with a consistency model beside it where a chain needs one."""
    needs = {part.kind for part in purifier.purifiers} if isinstance(purifier, Chain) else set()
    if "consistency" not in needs:
        return CurvedDenoiser()
    return BackbonePair(ToyBackbone(SHAPE).double().requires_grad_(False), CurvedDenoiser())


def images_of(count: int = 2, dtype: torch.dtype = DOUBLE) -> Tensor:
    return 0.25 + 0.5 * uniform(count, *SHAPE, seed=1, dtype=dtype)


def model_of(purifier: Purifier, backbone: Any = None, **options: Any) -> PurifiedClassifier:
    chosen = {"classifier": Classifier(), "seed": 3, "vote": "soft"} | options
    return PurifiedClassifier(backbone=backbone or backbone_for(purifier), purifier=purifier, **chosen).eval()
