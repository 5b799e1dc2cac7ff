"""How often each image is attacked and asked about: the numbers that a figure depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cmap_defense.errors import SettingsError
from cmap_defense.settings import Settings, require_choice, require_flag, require_integer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Protocol", "Subset", "answer_seeds", "run_indices"]

RUN = 2**40
"""So far apart lie the noise indices of an image in two runs."""

MOST_RUNS = 2**22
"""Noise indices stay within 63 bits."""

ANSWERS = 0xA45
"""Sets the noise of the answers apart from that of all attacks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol(Settings):
    """How often each image is attacked and asked about.

    answers: N, fresh answers to each final image. By them are one-shot, average, any-of-N and vote-of-N counted, and
        the worst attack on each image chosen.
    repurifications: R, further fresh answers, on which nothing is chosen. The headline is counted on them.
    seeds: one run for each, 0 at least and below 2^22; noise of attacks and answers is another in each.
    group: images that are attacked together, always the same ones. It changes rounding, and so belongs to the results.
    search_control: answer about clean images as often as the longest search among the attacks asks the defence, so that
        success while searching can be compared with luck.
    sanity_images: how many of the images the checks of the attacks are made on, the first of them; 0 for no checks, and
        then there is no headline.
    gradient_samples: gradients that the check of averaged gradients draws for each image, an even number.

    Raises:
        SettingsError: a value is out of its range.
    """

    answers: int = 10
    repurifications: int = 20
    seeds: tuple[int, ...] = (0,)
    group: int = 32
    search_control: bool = True
    sanity_images: int = 16
    gradient_samples: int = 64

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_integer(name, "answers", self.answers, minimum=1)
        require_integer(name, "repurifications", self.repurifications, minimum=1)
        require_integer(name, "group", self.group, minimum=1)
        require_integer(name, "sanity_images", self.sanity_images, minimum=0)
        require_flag(name, "search_control", self.search_control)
        if require_integer(name, "gradient_samples", self.gradient_samples, minimum=2) % 2:
            raise SettingsError(f"{name}.gradient_samples must be even, but is {self.gradient_samples}.")
        if isinstance(self.seeds, str) or not isinstance(self.seeds, Sequence) or not self.seeds:
            raise SettingsError(f"{name}.seeds must be integers, one for each run, but is {self.seeds!r}.")
        seeds = tuple(require_integer(name, "seeds", seed, minimum=0) for seed in self.seeds)
        if len(set(seeds)) < len(seeds) or max(seeds) >= MOST_RUNS:
            raise SettingsError(f"{name}.seeds must differ and be below {MOST_RUNS}, but are {list(seeds)}.")
        object.__setattr__(self, "seeds", seeds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset(Settings):
    """Which images of a data set are evaluated.

    count: how many; None for all. order: "first"; "last", in their order: of a training split that is no folder what
    ``train --hold-out`` left out; or "random" for ``numpy.random.RandomState(seed).choice`` without replacement, in the
    order drawn, as in the paper's scripts. seed: of that draw, below 2^32.

    Raises:
        SettingsError: a value is out of its range.
    """

    count: int | None = None
    order: str = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is not None:
            require_integer("Subset", "count", self.count, minimum=1)
        require_choice("Subset", "order", self.order, ("first", "last", "random"))
        require_integer("Subset", "seed", self.seed, minimum=0, below=2**32)

    def indices(self, total: int) -> list[int]:
        """Positions in a data set of ``total`` images. Raises :class:`SettingsError` where it has too few, or none."""
        count = total if self.count is None else self.count
        if not 1 <= count <= total:
            remedy = f" Take {total} at most: -n {total}, or Subset(count={total})." if total else ""
            raise SettingsError(f"{count} images are to be evaluated, but the data set has {total}.{remedy}")
        if self.order == "first":
            return list(range(count))
        if self.order == "last":
            return list(range(total - count, total))
        import numpy as np

        return np.random.RandomState(self.seed).choice(total, count, replace=False).tolist()


def run_indices(indices: Tensor, seed: int) -> Tensor:
    """[B] the noise indices of images [B] in the run of that seed; in run 0 they are the positions themselves."""
    return indices + seed * RUN


def answer_seeds(indices: Tensor, number: int) -> Tensor:
    """[B] the noise of answer ``number`` about images with these noise indices.

    The same for all attacks and for the clean image, so that differences between them are not made of noise.
    """
    from cmap_defense.rng import derived_seeds  # here, so that the settings alone can be imported without torch

    return derived_seeds(derived_seeds(indices, ANSWERS), number)
