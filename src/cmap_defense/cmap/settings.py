"""The constants of CMAP."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from typing_extensions import Self

from cmap_defense.errors import UnknownNameError
from cmap_defense.settings import Settings, near_matches, require_integer, require_number, require_numbers

__all__ = ["PRESETS", "CMAPSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMAPSettings(Settings):
    """Settings of the latent optimisation (arXiv 2412.08394, section 4; the defaults are the released CIFAR-10 ones).

    Args:
        n_latents: K, the latents per image, 1 at least. K = 1 has no standard deviation: eq. 12 is then its mean term
            alone.
        iterations: N, the Adam steps, 1 at least; 0 too where there is a level, which is one-step purification then.
        learning_rate: of Adam on unit latents, above 0.
        betas: of Adam, each in [0, 1).
        eps: of Adam, on the gradient of K times eq. 9 with respect to unit latents, above 0.
        ssim_weight: weight of the SSIM sum in eq. 10, 0 at least.
        latent_weight: weight of eq. 12 in eq. 9, for unit latents, 0 at least.
        level: s, the noise level of the latents, in units of images in [-1, 1]. None is the paper's method: latents are
            those of the highest level, and their images G(u) do not depend on the input otherwise. With a number they
            live around the input x' = 2 x - 1: the images are clip(f(x' + s u, s), -1, 1), with f the backbone's
            ``denoise``. This family is ours, not the paper's.
        l1_smoothing: half-width d of the smooth corner of L1, in units of images in [-1, 1]: sqrt(r^2 + d^2) - d. 0,
            the method's own, has a sharp corner.

    Raises:
        SettingsError: a value is out of its range, not finite or of the wrong type.
    """

    n_latents: int = 10
    iterations: int = 200
    learning_rate: float = 0.025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 8e-7
    ssim_weight: float = 2.0
    latent_weight: float = 3.2
    level: float | None = None
    l1_smoothing: float = 0.0

    _synonyms: ClassVar[Mapping[str, str]] = {
        "k": "n_latents",
        "latents": "n_latents",
        "n": "iterations",
        "steps": "iterations",
        "lr": "learning_rate",
    }

    def __post_init__(self) -> None:
        require_integer("CMAPSettings", "n_latents", self.n_latents, minimum=1)
        if self.level is not None:
            require_number("CMAPSettings", "level", self.level, above=0.0)
        require_integer("CMAPSettings", "iterations", self.iterations, minimum=1 if self.level is None else 0)
        require_number("CMAPSettings", "learning_rate", self.learning_rate, above=0.0)
        require_number("CMAPSettings", "eps", self.eps, above=0.0)
        require_number("CMAPSettings", "ssim_weight", self.ssim_weight, minimum=0.0)
        require_number("CMAPSettings", "latent_weight", self.latent_weight, minimum=0.0)
        require_number("CMAPSettings", "l1_smoothing", self.l1_smoothing, minimum=0.0)
        betas = require_numbers("CMAPSettings", "betas", self.betas, length=2, minimum=0.0, below=1.0)
        object.__setattr__(self, "betas", betas)

    @classmethod
    def preset(cls, name: str) -> Self:
        """The released settings by name, one of :data:`PRESETS`. Raises :class:`UnknownNameError` with near matches."""
        if name not in PRESETS:
            raise UnknownNameError(f"There is no preset {name!r}.{near_matches(str(name), PRESETS)}")
        return cls.from_dict(PRESETS[name])


PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "cifar10": MappingProxyType({}),
        "imagenet100": MappingProxyType(
            {"n_latents": 5, "iterations": 300, "eps": 1.6e-4, "ssim_weight": 0.5, "latent_weight": 1.28}
        ),
    }
)
"""Released settings per data set, as changes to the defaults (arXiv 2412.08394, released scripts)."""
