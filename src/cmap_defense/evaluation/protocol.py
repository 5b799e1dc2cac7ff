"""How often each image is attacked and predicted: the numbers that a figure depends on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cmap_defense.common.settings import Settings, setting
from cmap_defense.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor

RUN = 2**40
"""Distance between the noise indices of an image in two runs."""

MOST_RUNS = 2**22
"""Noise indices stay within 63 bits."""

PREDICTIONS = 0xA45
"""Separates the noise of the predictions from that of all attacks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol(Settings):
    """How often each image is attacked and predicted.

    Args:
        predictions: N, predictions with independent noise for each final image. One-shot accuracy, average, worst of N
            and vote of N are computed from them, and by them the worst attack on each image is chosen.
        reevaluations: R, further such predictions, by which nothing is chosen. The headline is computed from them.
        seeds: one run for each, 0 at least and below 2^22. The noise of attacks and predictions differs between runs.
        group: images that are attacked together, always the same ones. It changes rounding, and so belongs to the
            results.
        search_on_clean: predict clean images as often as the longest search among the attacks does, so that success
            during a search can be compared with chance.
        sanity_images: number of images, the first ones, on which the attacks are checked; 0 for no checks, and then
            there is no headline.
        gradient_samples: gradients that the check of averaged gradients draws for each image, an even number.

    Raises:
        SettingsError: a value is out of its range.
    """

    predictions: int = setting(10, "Number of predictions with independent noise for each final image (N).", minimum=1)
    reevaluations: int = setting(
        20, "Number of further predictions for each final image (R), by which nothing is selected.", minimum=1
    )
    seeds: tuple[int, ...] = setting((0,), "Seeds of the runs, one run for each.", minimum=0)
    group: int = setting(32, "Number of images that are attacked together.", minimum=1)
    search_on_clean: bool = setting(
        True,
        "Predict clean images as often as the longest search does, to measure its selection effect.",
        group="Checks of the attacks",
    )
    sanity_images: int = setting(
        16,
        "Number of images that the attacks are checked on. With 0 there are no checks and no headline.",
        minimum=0,
        group="Checks of the attacks",
    )
    gradient_samples: int = setting(
        64,
        "Number of gradients per image that the check of averaged gradients draws, an even number.",
        minimum=2,
        group="Checks of the attacks",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.gradient_samples % 2:
            raise SettingsError(f"{name}.gradient_samples must be even, but is {self.gradient_samples}.")
        if not self.seeds:
            raise SettingsError(f"{name}.seeds must be integers, one for each run, but is ().")
        if len(set(self.seeds)) < len(self.seeds) or max(self.seeds) >= MOST_RUNS:
            raise SettingsError(f"{name}.seeds must differ and be below {MOST_RUNS}, but are {list(self.seeds)}.")


def run_indices(indices: Tensor, seed: int) -> Tensor:
    """[B] the noise indices of images [B] in the run of that seed; in run 0 they are the positions themselves."""
    return indices + seed * RUN


def prediction_seeds(indices: Tensor, number: int) -> Tensor:
    """[B] the noise of prediction ``number`` for images with these noise indices.

    It is the same for all attacks and for the clean image, so that differences between them are not made of noise.
    """
    from cmap_defense.common.rng import derived_seeds  # here, so that the settings alone can be imported without torch

    return derived_seeds(derived_seeds(indices, PREDICTIONS), number)
