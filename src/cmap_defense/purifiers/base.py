"""What every purification defence looks like from outside."""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import Tensor, nn

from cmap_defense.cmap.optimise import Callback
from cmap_defense.errors import SettingsError
from cmap_defense.results import PurificationResult

__all__ = ["Purifier", "require_level"]


class Purifier(abc.ABC):
    """Images in, K purified versions of each out: frozen settings plus a call; it owns no weights.

    A subclass writes ``n_latents``, ``passes`` and the call.

    Attributes:
        needs: the method of a backbone that it uses: "generate" for one that needs a consistency model, "denoise" for
            one that takes a denoiser or a consistency model.
        optimises_latents: whether it is an optimisation over latents. Such a purifier has ``settings`` and ``prepare``,
            as :class:`~cmap_defense.purifiers.cmap.CMAP` has; hooks, latent attacks and gradients through the
            optimisation need them. The call of any other purifier is differentiable with respect to the images.
    """

    needs: ClassVar[str] = "denoise"
    optimises_latents: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def n_latents(self) -> int:
        """K, the number of purified versions of an image."""

    @property
    @abc.abstractmethod
    def passes(self) -> int:
        """The largest number of network passes that an image takes."""

    @abc.abstractmethod
    def __call__(
        self,
        backbone: nn.Module,
        images: Tensor,
        *,
        seeds: Tensor,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        callback: Callback | None = None,
        max_parallel: int | None = None,
    ) -> PurificationResult:
        """Purify images.

        Args:
            backbone: has the method that ``needs`` names; on the images' device.
            images: [B, C, H, W] in [0, 1], of the backbone's size.
            seeds: [B] int64 on the CPU; each image's noise is drawn from its own, so that the result does not depend on
                the batch.
            latents: [B, K, C, H, W] unit noise in place of that of the seeds; None for none.
            class_labels: [B, K] integers for a class-conditional backbone, None for another.
            callback: called before each step of an optimisation over latents; others ignore it.
            max_parallel: images in one call of the backbone; None for what fits.

        Returns:
            The purified images and the noise they came from. A classifier is not involved.
        """


def require_level(backbone: nn.Module, owner: str, level: float) -> None:
    """Raises :class:`SettingsError` where a noise level is above what a backbone was trained for.

    Args:
        backbone: it says ``noise``, or nothing is refused.
        owner: the class whose ``level`` it is.
        level: in units of images in [-1, 1].
    """
    noise_range = getattr(backbone, "noise", None)
    if noise_range is not None and level > noise_range.sigma_max:
        raise SettingsError(
            f"{owner}.level must be at most {noise_range.sigma_max:g}, the strongest noise of the backbone, but is "
            f"{level:g}."
        )
