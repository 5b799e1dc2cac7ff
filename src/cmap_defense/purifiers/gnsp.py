"""Gradual noise scheduling: several rounds of diffusing and denoising, from little noise to more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from cmap_defense.common.settings import setting
from cmap_defense.purifiers.multi_step import MultiStepPurifier, Run
from cmap_defense.purifiers.steps import ddim_step
from cmap_defense.purifiers.vp import TOTAL, vp_sigma

__all__ = ["GNSP"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GNSP(MultiStepPurifier):
    """Rounds of noise and reverse diffusion, from low levels to high (Lee and Kim 2023, arXiv 2303.09051, section 5).

    Every round noises what the round before left to level t of 1000 and takes all t DDPM steps down (those of eq. 12 of
    Song et al. 2021, arXiv 2010.02502, with eta = 1); the denoiser's output is not clipped. The K versions are voted
    on, 10 in the paper. The output is clamped.

    Args:
        rounds: t of each round, of 1000; none give the input back.
        eta: share of the noise of a DDPM step that is added in each; 1 is DDPM, 0 is DDIM without noise.
        n_latents: K, the purified versions of an image.

    Raises:
        SettingsError: a value is out of its range.
    """

    _sets_level: ClassVar[str] = "rounds"
    _advice: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("t", "level", "sigma"), "Its noise is that of its rounds, t of 1000 for each: GNSP(rounds=(30, 50))."
    )
    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cifar10-linf": {},
        "cifar10-l2": {},
        "svhn-linf": {"rounds": (30, 30, 30, 30, 50, 50, 80, 80)},
        "imagenet-linf": {"rounds": (30, 30, 30, 30, 50, 50, 200, 200)},
    }

    rounds: tuple[int, ...] = setting((30, 30, 30, 30, 50, 50, 125, 125), minimum=1, below=TOTAL + 1)
    eta: float = setting(1.0, minimum=0, maximum=1)
    n_latents: int = setting(10, minimum=1)  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    @property
    def level(self) -> float:
        return vp_sigma(max(self.rounds, default=0))

    @property
    def steps(self) -> int:
        return sum(self.rounds)

    def reverse(self, run: Run) -> Tensor:
        x, made = run.images, 0
        for top in self.rounds:
            x = x + vp_sigma(top) * run.noise()
            for t in range(top, 0, -1):
                x = run.watch(made, vp_sigma(t), x)
                clean = run.denoise(x, vp_sigma(t))
                x = ddim_step(x, clean, vp_sigma(t), vp_sigma(t - 1), run.noise(), eta=self.eta)
                made += 1
        return x
