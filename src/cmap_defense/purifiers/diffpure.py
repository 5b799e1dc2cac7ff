"""DiffPure: noise to a level, then the whole reverse diffusion."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from cmap_defense.common.settings import setting
from cmap_defense.purifiers.multi_step import MultiStepPurifier, Run
from cmap_defense.purifiers.steps import VARIANCES, ddpm_step
from cmap_defense.purifiers.vp import TOTAL, vp_beta, vp_scale, vp_sigma, vp_sigma_at, vp_time

__all__ = ["DiffPure"]

END = 1e-5
"""Continuous time at which the SDE and the ODE end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffPure(MultiStepPurifier):
    """Noise to level t, then back (Nie et al. 2022, arXiv 2205.07460, section 3).

    "sde" is the reverse VP-SDE (Song et al. 2021, arXiv 2011.13456, eq. 6 and 11) by Euler and Maruyama, "ode" the
    probability flow (eq. 13 there) by Euler, both with steps of ``step`` in continuous time; "ddpm" takes the t
    discrete steps (Ho et al. 2020, arXiv 2006.11239, eq. 7 and 11). The paper classifies one purification (K = 1); more
    of them are voted on.

    Differences from the official code (NVlabs/DiffPure): the last step adds no noise, where theirs leaves noise of
    standard deviation 0.011; the output is clamped; the solver starts at the time at which the noise level of the
    continuous diffusion is that of level t of the discrete one, where theirs has 0.4 % more or less; "ddpm" has a fixed
    variance, as the denoisers here learn none.

    Args:
        t: noise level, of 1000; 100 is a standard deviation of 0.34 for images in [-1, 1]. 0 gives the input back.
        solver: "sde", "ode" or "ddpm".
        step: of the SDE and the ODE, in continuous time (1e-5 to 1); 1e-3 is one step for each of the 1000 levels.
        variance: of "ddpm": "fixedlarge" (beta) or "posterior".
        clip_denoised: clip the denoiser's output of "ddpm" to [-1, 1] in every step.
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
        "cifar10-linf": {"t": 100},
        "cifar10-l2": {"t": 75},
        "cifar10-stadv": {"t": 125},
        "imagenet-linf": {"t": 150},
    }

    t: int = setting(100, minimum=0, below=TOTAL + 1)
    solver: str = setting("sde", choices=("sde", "ode", "ddpm"))
    step: float = setting(1e-3, minimum=END, below=1)
    variance: str = setting("fixedlarge", choices=VARIANCES)
    clip_denoised: bool = setting(True)
    n_latents: int = setting(1, minimum=1)  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    @property
    def level(self) -> float:
        return vp_sigma(self.t)

    @property
    def steps(self) -> int:
        return self.t if self.solver == "ddpm" or not self.t else len(self.times) - 1

    @property
    def times(self) -> list[float]:
        """The continuous times that the SDE and the ODE visit, from the noise level's down to 1e-5."""
        start = vp_time(self.level)
        count = max(1, math.ceil((start - END) / self.step - 1e-9))
        return [start - n * self.step for n in range(count)] + [END]

    def reverse(self, run: Run) -> Tensor:
        noisy = run.images + self.level * run.noise()
        return self._ddpm(run, noisy) if self.solver == "ddpm" else self._continuous(run, noisy)

    def _ddpm(self, run: Run, x: Tensor) -> Tensor:
        for t in range(self.t, 0, -1):
            x = run.watch(self.t - t, vp_sigma(t), x)
            clean = run.denoise(x, vp_sigma(t))
            clean = clean.clamp(-1, 1) if self.clip_denoised else clean
            x = ddpm_step(x, clean, vp_sigma(t), vp_sigma(t - 1), run.noise(), variance=self.variance)
        return x

    def _continuous(self, run: Run, x: Tensor) -> Tensor:
        """x <- x + h (0.5 beta x + c beta score) + sqrt(beta h) z in VP coordinates, c = 1 and z = 0 at the end."""
        stochastic = self.solver == "sde"
        for n, (now, after) in enumerate(itertools.pairwise(self.times)):
            sigma = vp_sigma_at(now)
            scale, size = vp_scale(sigma), (now - after) * vp_beta(now)
            x = run.watch(n, sigma, x)
            score = (run.denoise(x, sigma) - x) / (sigma**2 * scale)
            moved = (1 + size / 2) * scale * x + size * (1 if stochastic else 0.5) * score
            if stochastic and after > END:
                moved = moved + math.sqrt(size) * run.noise()
            x = moved / vp_scale(vp_sigma_at(after))
        return x
