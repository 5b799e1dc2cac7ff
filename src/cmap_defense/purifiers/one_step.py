"""One-step purification: add noise, denoise once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from cmap_defense.common.settings import setting
from cmap_defense.purifiers.multi_step import MultiStepPurifier, Run

__all__ = ["OneStep"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStep(MultiStepPurifier):
    """x -> clip(D(x' + level e, level), -1, 1), x' = 2 x - 1, e ~ N(0, I), K times with independent noise.

    D is the consistency function (Song et al. 2023, arXiv 2303.01469, eq. 5) or a denoiser (Karras et al. 2022, arXiv
    2206.00364, eq. 7). It is the cheapest purification there is: what takes longer has to be better than this one.
    Its exact gradient, ``gradient=Unrolled()``, costs one backward pass of the network for each of the K.

    Args:
        level: standard deviation of the noise, in units of images in [-1, 1]; 0 gives the input back.
        n_latents: K, the purified versions of an image.

    Raises:
        SettingsError: a value is out of its range.
    """

    kind: ClassVar[str | None] = None
    _example: ClassVar[bool] = True
    _synonyms: ClassVar[Mapping[str, str]] = {"sigma": "level", "noise": "level"}
    _advice: ClassVar[Mapping[str, str]] = {
        "t": "Its noise is a level, in units of images in [-1, 1]: level=vp_sigma(t), a function of "
        "cmap_defense.purifiers, for t of 1000."
    }
    _without_presets: ClassVar[str] = (
        "It has none: it is the step that several methods share, not the constants of one paper. Choose its level on "
        "held-out images: OneStep(level=...)."
    )

    level: float = setting(0.5, minimum=0)  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    n_latents: int = setting(4, minimum=1)  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    @property
    def steps(self) -> int:
        return 1 if self.level else 0

    def reverse(self, run: Run) -> Tensor:
        noisy = run.images + self.level * run.noise()
        noisy = run.watch(0, self.level, noisy)
        return run.denoise(noisy, self.level)
