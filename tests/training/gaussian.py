"""Data whose denoiser and consistency function are known: independent normal elements N(mu, s^2).

The marginal at noise level t is N(mu, s^2 + t^2). The mean of the clean element behind a noisy x is

    D(x, t) = mu + (x - mu) s^2 / (s^2 + t^2),

so the probability-flow ODE (Karras et al. 2022, eq. 1) reads dx/dt = (x - D) / t = t (x - mu) / (s^2 + t^2), and x - mu
grows along a trajectory as sqrt(s^2 + t^2). From f(x, sigma_min) = x follows

    f(x, t) = mu + (x - mu) sqrt((s^2 + sigma_min^2) / (s^2 + t^2)).
"""

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from cmap_defense.backbones import NoiseRange
from cmap_defense.common.rng import generator_for
from cmap_defense.training.objectives import Batch, Objective
from toys import noise

MU, S = 0.3, 0.5
NOISE = NoiseRange()


class _Gaussian(nn.Module):
    """Mean and standard deviation of the data as parameters; the arithmetic is float64."""

    def __init__(self, mean: float = MU, std: float = S) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    @property
    def std(self) -> float:
        return self.log_std.exp().item()


class GaussianConsistency(_Gaussian):
    """The consistency function of N(mean, std^2) data."""

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        variance = (2 * self.log_std).exp()
        shrink = ((variance + NOISE.sigma_min**2) / (variance + sigma.double() ** 2)).sqrt()[:, None, None, None]
        return self.mean + (noisy - self.mean) * shrink


class GaussianDenoiser(_Gaussian):
    """The denoiser of N(mean, std^2) data."""

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        variance = (2 * self.log_std).exp()
        return self.mean + (noisy - self.mean) * (variance / (variance + sigma.double() ** 2))[:, None, None, None]


class GaussianMixed(_Gaussian):
    """The denoiser, and ``weight`` times what the consistency function differs from it by: 0 at first."""

    def __init__(self, mean: float = MU, std: float = S) -> None:
        super().__init__(mean, std)
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        variance = (2 * self.log_std).exp()
        there = variance + sigma.double() ** 2
        denoised, consistent = variance / there, ((variance + NOISE.sigma_min**2) / there).sqrt()
        shrink = (1 - self.weight) * denoised + self.weight * consistent
        return self.mean + (noisy - self.mean) * shrink[:, None, None, None]


def plain_consistency(x: float, t: float) -> float:
    """f of one element."""
    return MU + (x - MU) * math.sqrt((S**2 + NOISE.sigma_min**2) / (S**2 + t**2))


def plain_denoiser(x: float, t: float) -> float:
    """D of one element."""
    return MU + (x - MU) * S**2 / (S**2 + t**2)


def plain_heun(x: float, t: float, r: float) -> float:
    """One step of Algorithm 1 of Karras et al. 2022 from level t to r, with the exact denoiser, for one element."""
    d = (x - plain_denoiser(x, t)) / t
    euler = x + (r - t) * d
    d_there = (euler - plain_denoiser(euler, r)) / r
    return x + (r - t) * (0.5 * d + 0.5 * d_there)


def rows(values: Tensor) -> list[list[float]]:
    """The elements of each image, in float64."""
    return values.double().flatten(1).tolist()


def plain_noisy(images: Tensor, z: Tensor, levels: Tensor) -> list[list[float]]:
    """x + sigma z, the elements of each image."""
    return [
        [x + sigma * n for x, n in zip(xs, ns, strict=True)]
        for xs, ns, sigma in zip(rows(images), rows(z), levels.tolist(), strict=True)
    ]


def at_levels(function: Callable[[float, float], float], noisy: list[list[float]], levels: Tensor) -> list[list[float]]:
    """``function`` of each element and its image's noise level."""
    return [[function(x, sigma) for x in xs] for xs, sigma in zip(noisy, levels.tolist(), strict=True)]


def plain_squares(a: list[list[float]], b: list[list[float]]) -> list[float]:
    """||a - b||^2 per image."""
    return [math.fsum((p - q) ** 2 for p, q in zip(x, y, strict=True)) for x, y in zip(a, b, strict=True)]


def plain_huber(a: list[list[float]], b: list[list[float]], c: float) -> list[float]:
    """sqrt(||a - b||^2 + c^2) - c per image."""
    return [math.sqrt(square + c * c) - c for square in plain_squares(a, b)]


def gaussian_images(count: int, seed: int) -> Tensor:
    return MU + S * noise(count, 1, 2, 3, seed=seed)


def drawn(images: Tensor, progress: float, *words: int) -> Batch:
    """What the loop would draw."""
    generator = generator_for(*words)
    uniform = torch.rand(len(images), generator=generator, dtype=torch.float64)
    return Batch(images, torch.randn(images.shape, generator=generator), uniform, progress)


Gaussian = TypeVar("Gaussian", bound=_Gaussian)


def train_linear(
    model: Gaussian, objective: Objective, steps: int, *, rate: float = 0.02, batch: int = 256
) -> Gaussian:
    """Train ``model`` by Adam, its rate falling along a half cosine, with a running average as target where the
    objective has one."""
    target = copy.deepcopy(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
    for step in range(steps):
        progress = step / steps
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        losses = objective.losses(model, drawn(gaussian_images(batch, 10 + step), progress, 0, step), NOISE, target)
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()
        decay = objective.decay_at(progress) or 0.0
        with torch.no_grad():
            for average, weight in zip(target.parameters(), model.parameters(), strict=True):
                average.mul_(decay).add_((1 - decay) * weight)
    return model
