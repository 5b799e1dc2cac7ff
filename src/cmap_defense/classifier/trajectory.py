"""A latent hook that keeps the images on the way, for an animation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cmap_defense.cmap.optimise import LatentState
from cmap_defense.common.settings import require_integer
from cmap_defense.errors import SettingsError
from cmap_defense.plots.purification import version_grid, write_animation


class Trajectory:
    """The generated images at every few iterations of a latent optimisation.

        trajectory = Trajectory(every=5)
        with model.register_latent_hook(trajectory):
            model.purify(images)
        trajectory.animate("purification.gif")

    Args:
        every: iterations from one frame to the next.

    Attributes:
        frames: [B, K, C, H, W] in [0, 1] each, on the CPU. An image that has stopped stays as it was.
        inputs: [B, C, H, W] in [0, 1]; None before the first iteration.

    Raises:
        SettingsError: ``every`` is no integer above 0.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = require_integer("Trajectory", "every", every, minimum=1)
        self.frames: list[Tensor] = []
        self.inputs: Tensor | None = None
        self._last = -1

    def __call__(self, state: LatentState) -> None:
        if not self.frames or state.iteration <= self._last:  # another purification
            self.frames, self.inputs = [], state.images.detach().cpu()
        self._last = state.iteration
        if state.iteration % self.every == 0:
            images = (state.generated.detach().cpu().float() + 1) / 2
            frame = torch.empty_like(images) if not self.frames else self.frames[-1].clone()
            frame[state.image_indices] = images
            self.frames.append(frame)

    def animate(self, path: str | Path, *, milliseconds: int = 100, scale: int | None = None) -> Path:
        """Write a GIF: a row for each image, the input first, then its K versions as they change.

        Args:
            path: of the file.
            milliseconds: of a frame.
            scale: pixels of the picture per pixel of an image; None for images of about 96 pixels.

        Raises:
            SettingsError: no purification has been watched.
        """
        if not self.frames:
            raise SettingsError(
                "There is nothing to animate: purify images while this hook is registered, "
                "with model.register_latent_hook(trajectory)."
            )
        pictures = [version_grid(frame, self.inputs, scale=scale) for frame in self.frames]
        return write_animation(pictures, path, milliseconds=milliseconds)
