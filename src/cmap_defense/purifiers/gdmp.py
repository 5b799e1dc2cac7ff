"""GDMP: rounds of diffusing and denoising in which every step is guided towards the input."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.common.settings import require_integer, setting
from cmap_defense.purifiers.multi_step import MultiStepPurifier, Run
from cmap_defense.purifiers.steps import ddpm_step
from cmap_defense.purifiers.vp import TOTAL, vp_scale, vp_sigma
from cmap_defense.threat import require_linf_size

__all__ = ["GDMP"]

PIXELS = 3072
"""C H W of the images that the strength is meant for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GDMP(MultiStepPurifier):
    """Guided diffusion (Wang et al. 2022, arXiv 2205.14969, algorithm 1).

    Every round noises what the round before left to the level of ``t`` and takes all DDPM steps down (Ho et al. 2020,
    arXiv 2006.11239, eq. 7 and 11), with the denoiser's output clipped and variance beta. The mean of step i is moved
    by var_i s_i g, where s_i = 3 strength sigma_i / (2 eps), and g is the gradient of -MSE or SSIM between the image of
    the step and the input, freshly noised to the level of the step. The input is the first one in every round. The K
    versions are voted on.

    Differences from the official code (JinyiW/GuidedDiffusionPur): its MSE and SSIM are means over the batch, so that
    the strength depends on the batch size: the constant 60000 closes 2.6 % of the gap to the input in a round at a
    batch of 100, and 93.8 % at a batch of 1. Here they are means over one image, and the strength is that of the
    official code at a batch of 100, times C H W / 3072, so that the same share of the gap is closed at every size.
    The official code noises to one level more than it denoises from; both are the same here. The noise of the input in
    the guide takes part in the exact gradient, as the denoised image does.

    Args:
        t: steps of a round, which starts at noise level t of ``levels``. 0 gives the input back.
        rounds: how often; 0 gives the input back.
        guide: "mse", "ssim" or "none".
        strength: G, of the guide.
        eps: size of the perturbation that the guide allows for, in units of images in [0, 1].
        noise_target: noise the input to the level of the step before it is compared; False takes it as it is.
        levels: noise levels in all, of which each round takes the first t: 1000, or fewer, evenly spaced among them.
        n_latents: K, the purified versions of an image.

    Raises:
        SettingsError: a value is out of its range.
    """

    _sets_level: ClassVar[str] = "t"
    _synonyms: ClassVar[Mapping[str, str]] = {"timestep": "t"}
    _advice: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("level", "sigma"),
        "Its noise is t of 1000: choose t so that vp_sigma(t), of cmap_defense.purifiers, is your level.",
    )
    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cifar10-linf": {},
        "cifar10-bpda": {"t": 60, "rounds": 2, "guide": "ssim", "strength": 10.0},
        "cifar10-spsa": {"t": 50, "rounds": 2, "guide": "none", "n_latents": 1},
        "imagenet-linf": {
            "t": 45,
            "rounds": 1,
            "guide": "ssim",
            "strength": 10.0,
            "eps": 4 / 255,
            "noise_target": False,
            "levels": 250,
            "n_latents": 1,
        },
    }

    t: int = setting(36, minimum=0)
    rounds: int = setting(4, minimum=0)
    guide: str = setting("mse", choices=("mse", "ssim", "none"))
    strength: float = setting(600.0, minimum=0)
    eps: float = setting(8 / 255, above=0)
    noise_target: bool = setting(True)
    levels: int = setting(TOTAL, minimum=2, below=TOTAL + 1)
    n_latents: int = setting(10, minimum=1)  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_linf_size("GDMP", "eps", self.eps)
        require_integer("GDMP", "t", self.t, minimum=0, below=self.levels + 1)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise levels of indices 0 to max(t - 1, 1), for images in [-1, 1]."""
        spacing = (TOTAL - 1) / (self.levels - 1)
        return tuple(vp_sigma(round(index * spacing) + 1) for index in range(max(self.t, 2)))

    @property
    def level(self) -> float:
        return self.sigmas[self.t - 1] if self.steps else 0.0

    @property
    def steps(self) -> int:
        return self.t * self.rounds

    def variances(self) -> tuple[float, ...]:
        """var_i of every index in VP coordinates: beta_i; at 0, where no noise is added, the posterior's of index 1."""
        sigmas = self.sigmas
        betas = [(high**2 - low**2) / (1 + high**2) for low, high in itertools.pairwise(sigmas)]
        gone = [sigma**2 / (1 + sigma**2) for sigma in sigmas[:2]]
        return (betas[0] * gone[0] / gone[1], *betas)

    def reverse(self, run: Run) -> Tensor:
        sigmas, variances = self.sigmas, self.variances()
        x, made = run.images, 0
        for _ in range(self.rounds):
            x = x + self.level * run.noise()
            for index in range(self.t - 1, -1, -1):
                high, low = sigmas[index], sigmas[index - 1] if index else 0.0
                x = run.watch(made, high, x)
                clean = run.denoise(x, high).clamp(-1, 1)
                moved = ddpm_step(x, clean, high, low, run.noise(), variance="fixedlarge")
                x = moved + variances[index] / vp_scale(low) * self._guidance(run, x, high)
                made += 1
        return x

    def _guidance(self, run: Run, x: Tensor, sigma: float) -> Tensor | float:
        """s_i g in VP coordinates."""
        if self.guide == "none":
            return 0.0
        scale, count = vp_scale(sigma), math.prod(x.shape[1:])
        size = 3 * self.strength * (count / PIXELS) * sigma / (2 * self.eps)
        target = run.images
        if self.noise_target:
            target = scale * (target + sigma * run.noise())
        if self.guide == "mse":
            return size * 2 / count * (target - scale * x)
        return size * run.denoise.in_chunks(_ssim_gradient, scale * x, target)


def _ssim_gradient(images: Tensor, target: Tensor) -> Tensor:
    """The gradient of the mean SSIM with respect to ``images``; the images of [-1, 1] are compared as they are."""
    wanted = torch.is_grad_enabled() and (images.requires_grad or target.requires_grad)
    with torch.enable_grad():
        inside = images if images.requires_grad else images.detach().requires_grad_()
        mean = SSIMReference.of(target).ssim_sum(inside) / math.prod(images.shape[1:])
        return torch.autograd.grad(mean.sum(), inside, create_graph=wanted)[0]
