"""What an objective gets, and what it is: losses per image, a pure function of what the loop drew."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser, NoiseRange, karras_levels
from cmap_defense.common.settings import Settings
from cmap_defense.errors import SettingsError
from cmap_defense.training.objectives.distances import Distance, distance_named

Model = ConsistencyBackbone | EDMDenoiser
"""What an objective trains."""

MODELS: dict[str, type[ConsistencyBackbone] | type[EDMDenoiser]] = {
    "consistency": ConsistencyBackbone,
    "denoiser": EDMDenoiser,
}
"""Kind of an objective -> what it trains."""

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Noisy images [B, C, H, W] and noise levels sigma [B] to images [B, C, H, W]; class labels, where there are any, are
bound already."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """The input of one step, on the network's device.

    Noise and numbers come from (seed, step) and belong to the image's place in the whole batch, so that they do not
    depend on the number of processes.

    Attributes:
        images: float32 [B, C, H, W] in [-1, 1].
        z: unit normal noise, [B, C, H, W].
        uniform: float64 [B] in (0, 1); noise levels are drawn by inverting their distribution at them.
        progress: finished part of the training, in [0, 1).
        labels: int64 [B], the classes of the images; None for an unconditional network. Model and target have them
            bound already.
    """

    images: Tensor
    z: Tensor
    uniform: Tensor
    progress: float
    labels: Tensor | None = None

    def rows(self, chosen: slice) -> Batch:
        """Some of its images, with what was drawn for them."""
        parts = {name: getattr(self, name)[chosen] for name in ("images", "z", "uniform")}
        return dataclasses.replace(self, **parts, labels=None if self.labels is None else self.labels[chosen])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Settings, abc.ABC):
    """Base of the training objectives: frozen settings, and the loss per image.

    Attributes:
        name: name in records and on the command line.
        kind: kind of the trained model: "consistency" (f of Song et al. 2023) or "denoiser" (D of Karras et al. 2022).
    """

    name: ClassVar[str]
    kind: ClassVar[str]

    @abc.abstractmethod
    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        """The losses of a batch.

        Args:
            model: the trained model.
            batch: images, noise and numbers of this step.
            noise: noise levels of the model.
            target: gives the values to come close to, called without gradients: the model itself, or its running
                average where ``decay_at`` gives a number.

        Returns:
            [B], float32 or wider.
        """

    def decay_at(self, progress: float) -> float | None:
        """Decay mu of the target's running average, target <- mu target + (1 - mu) model.

        Args:
            progress: finished part of the training before the step, in [0, 1).

        Returns:
            mu, or None where the target is the model itself.
        """
        return None

    @property
    def sources(self) -> Mapping[str, Mapping[str, Any]]:
        """Other models that the losses depend on: role, such as "teacher", -> name and checksum, for records."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON, for records and checkpoints."""
        return {"name": self.name, **self.to_dict()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedDistance(Objective):
    """Base of objectives whose distance is chosen by name, and made at once rather than at the first step."""

    distance: str
    lpips: Distance | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert callable(self._distance)

    @functools.cached_property
    def _distance(self) -> Distance:
        return distance_named(self.distance, huber=getattr(self, "huber", None), lpips=self.lpips)


def noisy_images(images: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """x + sigma z, for images and noise [B, C, H, W] and sigma [B]."""
    return images + sigma[:, None, None, None] * z


def consistency_loss(
    model: Denoise,
    target: Denoise,
    images: Tensor,
    z: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    distance: Distance,
    teacher: Denoise | None = None,
) -> Tensor:
    """d(f(x_t, t), f^-(x_r, r)) per image, [B]; arXiv 2303.01469, eq. 10, or 7 with a teacher, with lambda = 1.

    Args:
        model: f, at x_t = x + t z.
        target: f^-, at x_r, without a gradient.
        images: clean images x, [B, C, H, W].
        z: unit normal noise, [B, C, H, W].
        t: t_n+1, [B].
        r: t_n, [B].
        distance: d.
        teacher: the denoiser whose Heun step goes from x_t to x_r (eq. 6 there); None for x_r = x + r z.
    """
    noisy = noisy_images(images, z, t)
    with torch.no_grad():
        less_noisy = noisy_images(images, z, r) if teacher is None else heun_step(teacher, noisy, t, r)
    return distance(*consistency_pair(model, target, noisy, t, less_noisy, r))


def heun_step(denoise: Denoise, noisy: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """One step of Heun's method along the flow dx/dt = (x - D(x, t)) / t; arXiv 2206.00364, Algorithm 1.

    Args:
        denoise: the denoiser D.
        noisy: x_t, [B, C, H, W].
        t: noise levels of x_t, [B], above 0.
        r: noise levels to go to, [B], above 0; below t when images are made.

    Returns:
        x_r, [B, C, H, W].
    """
    level = (slice(None), None, None, None)
    step = (r - t)[level]
    slope = (noisy - denoise(noisy, t)) / t[level]
    euler = noisy + step * slope
    slope_there = (euler - denoise(euler, r)) / r[level]
    return noisy + step * (slope + slope_there) / 2


def consistency_pair(
    model: Denoise, target: Denoise, noisy: Tensor, t: Tensor, less_noisy: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """f(noisy, t) and f^-(less_noisy, r), [B, C, H, W] each, without a gradient through the second.

    Both have the same dropout masks (arXiv 2310.14189, section 3.1): torch's generators, from which the masks are
    drawn, start the second call in the state in which they started the first. Afterwards they are where the first left
    them.
    """
    cuda = [noisy.device] if noisy.device.type == "cuda" else []
    cpu_state, cuda_states = torch.random.get_rng_state(), [torch.cuda.get_rng_state(device) for device in cuda]
    ahead = model(noisy, t)
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.random.set_rng_state(cpu_state)
        for device, state in zip(cuda, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, device)
        behind = target(less_noisy, r)
    return ahead, behind


def lognormal_levels(uniform: Tensor, mean: float, std: float, noise: NoiseRange) -> Tensor:
    """Levels sigma with ln sigma ~ N(mean, std^2), clamped to the noise range (arXiv 2206.00364, Table 1)."""
    log_sigma = mean + std * torch.special.ndtri(uniform.double())
    return log_sigma.exp().clamp(noise.sigma_min * (1 + 1e-3), noise.sigma_max).float()


def uniform_index(uniform: Tensor, count: int) -> Tensor:
    """[B] integers from 0 to count - 1, all equally likely, from uniform numbers [B] in (0, 1)."""
    return (uniform.double() * count).long().clamp_max(count - 1)


def lognormal_index(uniform: Tensor, count: int, noise: NoiseRange, *, rho: float, mean: float, std: float) -> Tensor:
    """Intervals i between Karras levels, as likely as ln sigma ~ N(mean, std^2) is in them (arXiv 2310.14189, Table 1):

    p(i) ~ erf((ln sigma_i+1 - mean) / (sqrt 2 std)) - erf((ln sigma_i - mean) / (sqrt 2 std)).
    """
    reached = _reached(count, noise, rho, mean, std, uniform.device)
    return torch.searchsorted(reached, uniform.double().contiguous(), right=True)


def adjacent_levels(index: Tensor, count: int, noise: NoiseRange, rho: float) -> tuple[Tensor, Tensor]:
    """t_n+1 and t_n, each [B] in float32, of ``count`` Karras levels t_1 = sigma_min to t_count = sigma_max."""
    levels = _levels(count, noise, rho, index.device)
    return levels[index + 1], levels[index]


@functools.lru_cache(maxsize=8)
def _levels(count: int, noise: NoiseRange, rho: float, device: torch.device) -> Tensor:
    """Cached, so that not every step waits for a copy to the device."""
    return torch.tensor(karras_levels(count, noise, rho=rho), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=8)
def _reached(count: int, noise: NoiseRange, rho: float, mean: float, std: float, device: torch.device) -> Tensor:
    """Probability of the intervals below each inner level, float64, cached as the levels are."""
    levels = karras_levels(count, noise, rho=rho)
    below = torch.erf((torch.tensor(levels, dtype=torch.float64).log() - mean) / (2**0.5 * std))
    if not below[-1] > below[0]:
        raise SettingsError(
            f"ln sigma ~ N({mean:g}, {std:g}^2) never falls between the noise levels {levels[0]:g} and {levels[-1]:g}: "
            "choose another sigma_mean or a larger sigma_std."
        )
    return ((below - below[0]) / (below[-1] - below[0]))[1:-1].to(device)
