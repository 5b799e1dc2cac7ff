"""The constants of CMAP."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from typing_extensions import Self

from cmap_defense.common.settings import Settings, near_matches, require_integer, setting
from cmap_defense.errors import UnknownNameError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMAPSettings(Settings):
    """Settings of the latent optimisation (arXiv 2412.08394, section 4; the defaults are the released CIFAR-10 ones).

    Args:
        n_latents: K, the latents per image, 1 at least. K = 1 has no standard deviation: eq. 12 is then its mean term
            alone.
        iterations: N, the Adam steps, 1 at least; 0 too where there is a level, which is one-step purification then.
        learning_rate: of Adam on unit latents, above 0.
        schedule: of the learning rate over the N iterations: "constant", the paper's, or "cosine", which is ours here:
            step n has the rate learning_rate (1 + cos(pi n / N)) / 2 (Loshchilov and Hutter 2017, arXiv 1608.03983).
        betas: of Adam, each in [0, 1).
        eps: of Adam, on the gradient of K times eq. 9 with respect to unit latents, above 0.
        ssim_weight: weight of the SSIM sum in eq. 10, 0 at least.
        latent_weight: weight of eq. 12 in eq. 9, for unit latents, 0 at least.
        level: s, the noise level of the latents, in units of images in [-1, 1]. None is the paper's method: latents are
            those of the highest level, and their images G(u) do not depend on the input otherwise. With a number they
            live around the input x' = 2 x - 1: the images are clip(f(x' + s u, s), -1, 1), with f the backbone's
            ``denoise``. This family is ours, not the paper's.
        stop_decrease: an image stops early where its objective fell by less than this share over the last
            ``stop_window`` iterations, in (0, 1). The share is that of the distance from the lowest value that eq. 9
            can have, -ssim_weight C H W. None, the paper's: no such stop.
        stop_window: the iterations over which the decrease is taken, 1 at least.
        stop_agreement: an image stops early where all its K images get one label, and the same at the check before; a
            check is made every ``stop_agreement`` iterations and costs K passes of the classifier. None, the paper's:
            no such stop.
        tolerance: t of a dead zone around the input in L1, in units of images in [-1, 1]: max(|r| - t, 0) in place of
            |r|, so that differences up to t cost nothing there. An eps of images in [0, 1] is t = 2 eps. 0 is the
            paper's.
        l1_smoothing: half-width d of the smooth corner of L1, in units of images in [-1, 1]: sqrt(r^2 + d^2) - d. 0,
            the method's own, has a sharp corner.

    Raises:
        SettingsError: a value is out of its range, not finite or of the wrong type.
    """

    n_latents: int = setting(10, "Number of latents per image (K).", minimum=1)
    iterations: int = setting(200, "Number of iterations of the latent optimisation (N).", minimum=0)
    learning_rate: float = setting(0.025, "Learning rate of the latent optimisation.", above=0)
    schedule: str = setting(
        "constant", "Schedule of the learning rate over the iterations.", choices=("constant", "cosine")
    )
    betas: tuple[float, float] = setting((0.9, 0.99), minimum=0, below=1)
    eps: float = setting(8e-7, above=0)
    ssim_weight: float = setting(2.0, "Weight of SSIM in the reconstruction loss (10).", minimum=0)
    latent_weight: float = setting(3.2, "Weight of the latent constraint (12) in the objective (9).", minimum=0)
    level: float | None = setting(None, above=0)
    stop_decrease: float | None = setting(
        None, "Stop an image whose objective fell by less than this share over the last iterations.", above=0, below=1
    )
    stop_window: int = setting(10, "Number of iterations over which the decrease is taken.", minimum=1)
    stop_agreement: int | None = setting(
        None, "Stop an image whose K labels agree, and agree again this many iterations later.", minimum=1
    )
    tolerance: float = setting(
        0.0, "Difference from the input that costs nothing in L1, for images in [-1, 1].", minimum=0
    )
    l1_smoothing: float = setting(
        0.0, "Half-width of the smooth corner of L1, for images in [-1, 1]; 0 is the method's own.", minimum=0
    )

    _synonyms: ClassVar[Mapping[str, str]] = {
        "k": "n_latents",
        "latents": "n_latents",
        "n": "iterations",
        "steps": "iterations",
        "lr": "learning_rate",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("CMAPSettings", "iterations", self.iterations, minimum=1 if self.level is None else 0)

    def as_published(self) -> Self:
        """These settings without what is ours; the defaults where they are of a noise level."""
        return type(self)() if self.level else type(self)(**{name: getattr(self, name) for name in PUBLISHED})

    @property
    def additions(self) -> dict[str, Any]:
        """The settings that the paper does not have, by name, where their values are not those of its method."""
        ours = {field.name: field.default for field in dataclasses.fields(self) if field.name not in PUBLISHED}
        return {name: getattr(self, name) for name, value in ours.items() if getattr(self, name) != value}

    @property
    def summary(self) -> str:
        """K, N and ``additions`` in a line."""
        ours = "".join(f", {name} = {value}" for name, value in self.additions.items())
        return f"K = {self.n_latents} latents, N = {self.iterations} iterations{ours}"

    @property
    def stops(self) -> bool:
        """Whether images may stop before N iterations."""
        return self.stop_decrease is not None or self.stop_agreement is not None

    def rate_at(self, iteration: int) -> float:
        """The learning rate of step n = ``iteration``, from 0."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * iteration / self.iterations)) / 2

    @classmethod
    def preset(cls, name: str) -> Self:
        """The released settings by name, one of ``PRESETS``. Raises ``UnknownNameError`` with near matches."""
        if name not in PRESETS:
            raise UnknownNameError(f"There is no preset {name!r}.{near_matches(str(name), PRESETS)}")
        return cls.from_dict(PRESETS[name])


PUBLISHED = ("n_latents", "iterations", "learning_rate", "betas", "eps", "ssim_weight", "latent_weight")
"""The settings that the paper has too, by name."""

PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        **dict.fromkeys(("cifar10", "cifar10-linf", "cifar10-l2"), MappingProxyType({})),
        **dict.fromkeys(
            ("imagenet100", "imagenet100-linf", "imagenet100-l2"),
            MappingProxyType(
                {"n_latents": 5, "iterations": 300, "eps": 1.6e-4, "ssim_weight": 0.5, "latent_weight": 1.28}
            ),
        ),
    }
)
"""Released settings per data set, as changes to the defaults (arXiv 2412.08394, released scripts)."""
