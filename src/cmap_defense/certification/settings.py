"""How certificates are computed, as settings; without torch."""

from __future__ import annotations

import dataclasses
import math

from cmap_defense.common.settings import Settings, setting
from cmap_defense.errors import SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertificationSettings(Settings):
    """The options of CERTIFY (Cohen et al. 2019, arXiv 1902.02918), with the defaults of ``certify``.

    Args:
        n0: noisy copies of an image by which its class is chosen.
        n: fresh noisy copies by which the probability of that class is bounded.
        alpha: the largest probability that the certificate of an image is wrong.
        batch_size: noisy copies that are computed at the same time; None for what fits, 256 at most. It changes memory,
            not the result beyond rounding.
        seed: of the noise.

    Raises:
        SettingsError: a value is out of its range.
    """

    n0: int = setting(100, "Number of noisy copies of an image by which its class is chosen.", minimum=1)
    n: int = setting(10_000, "Number of fresh noisy copies by which that class's probability is bounded.", minimum=1)
    alpha: float = setting(
        0.001, "Largest probability that the certificate of an image is wrong.", above=0.0, below=1.0
    )
    batch_size: int | None = setting(
        None,
        "Number of noisy copies that are computed at the same time.",
        minimum=1,
        default_help="what fits, 256 at most",
    )
    seed: int = setting(0, "Seed of the noise.", minimum=0, below=2**32)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = math.floor(math.log(self.alpha) / math.log(0.5)) + 1
        if self.n < least:
            raise SettingsError(
                f"CertificationSettings.n must be at least {least} with alpha = {self.alpha:g}, but is {self.n}: with "
                "fewer copies nothing can be certified, even if all of them agree."
            )
