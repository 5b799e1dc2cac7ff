"""ADP: steps along the score with sizes that adapt to each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.common.settings import setting
from cmap_defense.purifiers.multi_step import MultiStepPurifier, Run

__all__ = ["ADP", "adaptive_step"]

STEP = 1e-3
"""Length of the trial step, and the step size at which an image stops."""
SMALLEST, LARGEST = 1e-5, 0.1
"""Bounds of the step size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ADP(MultiStepPurifier):
    """Adaptive denoising along the score (Yoon et al. 2021, arXiv 2106.06041, section 3).

    x in [0, 1] gets noise and is clamped. Up to ``iterations`` times: g = f(x), g' = f(x + 1e-3 g),
    z = <g, g'> / <g, g>, alpha = clamp(rate 1e-3 / (1 - z), 1e-5, 0.1), and x <- clamp(x + alpha g); an image stops for
    good where alpha <= 1e-3. The result's ``passes`` says how many network passes each image took.

    Differences from the official code (jmyoon1/adp): f there is the output of a score network that does not know the
    noise level. A denoiser has to be given one: f(x) = (D(x, s) - x) / s, which is s times the score (Karras et al.
    2022, arXiv 2206.00364, eq. 3), with s = noise at first, and s <- max(s - alpha, sigma_min) after each step, for
    x + alpha f(x) has less noise by alpha. This schedule is ours. The official code stretches the contrast by 256 / 255
    in each iteration, which is left out. It sums the logits of the 10 runs, where the vote here is that of the wrapper:
    ``vote="soft"`` comes near to it.

    Args:
        noise: standard deviation of the noise that is added, in units of images in [0, 1]; the paper also has 0.1.
        iterations: at most; 0 gives the input back.
        rate: lambda of the step size.
        n_latents: K, the purified versions of an image.

    Raises:
        SettingsError: a value is out of its range.
    """

    _sets_level: ClassVar[str] = "noise"
    _synonyms: ClassVar[Mapping[str, str]] = {"steps": "iterations"}
    _advice: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("level", "sigma"), "Its noise is half the level, for images in [0, 1]: ADP(noise=level / 2)."
    )
    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"cifar10-linf": {}, "cifar10-low-noise": {"noise": 0.1}}

    noise: float = setting(0.25, above=0)
    iterations: int = setting(10, minimum=0)
    rate: float = setting(0.05, above=0)
    n_latents: int = setting(10, minimum=1)  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    @property
    def level(self) -> float:
        return 2 * self.noise

    @property
    def steps(self) -> int:
        return 2 * self.iterations

    def reverse(self, run: Run) -> Tensor:
        known = getattr(getattr(run.denoise.backbone, "noise", None), "sigma_min", None)
        smallest = 0.001 if known is None else known / 2
        x = ((run.images + 1) / 2 + self.noise * run.noise()).clamp(0, 1)
        levels = x.new_full((len(x),), self.noise)
        rows = torch.arange(len(x), device=x.device)
        run.passes = torch.zeros_like(rows)

        def score(points: Tensor) -> Tensor:
            clean = (run.denoise(2 * points - 1, 2 * levels[rows], rows) + 1) / 2
            return (clean - points) / levels[rows, None, None, None]

        for n in range(self.iterations):
            shown = 2 * x - 1
            given = run.watch(2 * n, 2 * levels.detach().max().item(), shown)
            x = x if given is shown else (given + 1) / 2
            here = x[rows]
            first = score(here)
            second = score(here + STEP * first)
            run.passes[rows] += 2
            alpha = adaptive_step(first, second, self.rate)
            going = alpha.detach() > STEP
            rows, alpha = rows[going], alpha[going]
            if not len(rows):
                break
            moved = (here[going] + alpha[:, None, None, None] * first[going]).clamp(0, 1)
            x = x.index_copy(0, rows, moved)
            levels = levels.index_copy(0, rows, (levels[rows] - alpha).clamp_min(smallest))
        run.passes = run.passes.cpu()
        return 2 * x - 1


def adaptive_step(first: Tensor, second: Tensor, rate: float) -> Tensor:
    """alpha of each image [M], from its scores [M, C, H, W] at a point and 1e-3 along the score from there.

    Args:
        rate: lambda. Where the score is 0, or does not change along itself, alpha is at its bound, without a gradient.
    """
    length = first.square().flatten(1).sum(dim=1)
    bend = length - (first * second).flatten(1).sum(dim=1)
    still, straight = length == 0, bend == 0
    ratio = torch.where(straight, 1.0, bend) / torch.where(still, 1.0, length)
    alpha = (rate * STEP / ratio).clamp(SMALLEST, LARGEST)
    return torch.where(still, SMALLEST, torch.where(straight, LARGEST, alpha))
