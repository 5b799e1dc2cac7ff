"""Which images of a batch still need iterations. The stops are ours; the paper's loop makes N iterations."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmap_defense.cmap.losses import ObjectiveTerms
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.errors import SettingsError

Predict = Callable[[Tensor], Tensor]
"""Images [M, C, H, W] in [0, 1], of the backbone's size, to labels [M]."""


class Stopping:
    """Decides, image by image, after which iteration it stops; the other images of the batch take no part in it.

    Args:
        settings: with the conditions.
        shape: (B, K, C, H, W) of the latents.
        predict: for ``stop_agreement``.

    Attributes:
        made: [B] int64 on the CPU, the iterations that each image makes: N until it has stopped.

    Raises:
        SettingsError: ``stop_agreement`` is set, and there is no ``predict``.
    """

    def __init__(self, settings: CMAPSettings, shape: Sequence[int], predict: Predict | None = None) -> None:
        if settings.stop_agreement is not None and predict is None:
            raise SettingsError(
                "CMAPSettings.stop_agreement compares labels: give the purifier predict=..., images [M, C, H, W] in "
                "[0, 1] to labels [M]. PurifiedClassifier does so."
            )
        self.settings, self._shape, self._predict = settings, shape, predict
        self._lowest = -settings.ssim_weight * math.prod(shape[2:])
        self.made = torch.full((shape[0],), settings.iterations, device="cpu")
        self._excess: deque[Tensor] = deque(maxlen=settings.stop_window + 1)
        self._label = torch.full((shape[0],), -1, device="cpu")

    def decided(self) -> Stopping:
        """The same stops once more, without deciding anything."""
        again = Stopping(self.settings.replace(stop_decrease=None, stop_agreement=None), self._shape)
        again.made = self.made
        return again

    def rows(self, iteration: int) -> Tensor | None:
        """Positions [b] on the CPU of the images that make an iteration; None for all."""
        going = self.made > iteration
        return None if bool(going.all()) else going.nonzero().flatten()

    def checks_labels(self, iteration: int) -> bool:
        """Whether the images of an iteration are classified."""
        return self.settings.stop_agreement is not None and iteration % self.settings.stop_agreement == 0

    def observe(self, iteration: int, rows: Tensor | None, terms: ObjectiveTerms, generated: Tensor) -> None:
        """Decide which images stop after the step of an iteration.

        Args:
            iteration: n.
            rows: the images that make it, as from ``rows``.
            terms: the objective before the step, of these images.
            generated: [b, K, C, H, W] in [-1, 1], where ``checks_labels`` says so.
        """
        if not self.settings.stops:
            return
        rows = torch.arange(len(self.made), device="cpu") if rows is None else rows
        stopped = torch.zeros_like(rows, dtype=torch.bool)
        if self.settings.stop_decrease is not None:
            stopped |= self._stalled(rows, terms, self.settings.stop_decrease)
        if self.checks_labels(iteration):
            stopped |= self._agreed(rows, generated)
        self.made[rows[stopped]] = iteration + 1

    def _stalled(self, rows: Tensor, terms: ObjectiveTerms, share: float) -> Tensor:
        """Whether the objective fell by less than a share over the window, measured from its lowest value."""
        excess = torch.full_like(self.made, math.nan, dtype=terms.total.dtype)
        excess[rows] = terms.total.cpu() - self._lowest
        self._excess.append(excess)
        if len(self._excess) <= self.settings.stop_window:
            return torch.zeros_like(rows, dtype=torch.bool)
        before, now = self._excess[0][rows], excess[rows]
        return before - now < share * before

    def _agreed(self, rows: Tensor, generated: Tensor) -> Tensor:
        """Whether the K images of each input get one label, which was theirs at the check before as well."""
        assert self._predict is not None
        labels = self._predict((generated.flatten(0, 1).clamp(-1, 1) + 1) / 2).cpu().view(generated.shape[:2])
        label = torch.where((labels == labels[:, :1]).all(dim=1), labels[:, 0], -1)
        same = (label >= 0) & (label == self._label[rows])
        self._label[rows] = label
        return same
