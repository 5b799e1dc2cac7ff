"""Functions that watch, and may steer, the steps of a purification."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cmap_defense.cmap.optimise import LatentState
from cmap_defense.common.inputs import resize_images
from cmap_defense.common.settings import require_integer
from cmap_defense.errors import InputValueError, SettingsError
from cmap_defense.plots.purification import version_grid, write_animation
from cmap_defense.purifiers.multi_step import StepState
from cmap_defense.results import PurificationResult


@dataclasses.dataclass(frozen=True)
class StepHook:
    """A function that is called before the steps of a purification.

    Attributes:
        function: what is called with a ``LatentState`` of CMAP, or the ``StepState`` of another purifier.
        steps: those at which it is called; None for all.
        live: whether it is given states that are part of the graph.
    """

    function: Callable[[Any], Any]
    steps: Container[int] | None = None
    live: bool = False

    def at(self, step: int) -> bool:
        """Whether it is called at a step."""
        return self.steps is None or step in self.steps

    def __call__(self, state: Any) -> Any:
        """What the function returns at this state, without a graph unless it is live; None where it is not called."""
        if self.steps is not None and not self.at(step_of(state)):
            return None
        returned = self.function(state.detached() if isinstance(state, StepState) and not self.live else state)
        return returned if self.live or not isinstance(returned, Tensor) else returned.detach()


def step_of(state: Any) -> int:
    """The number of the step that a state is of; -1 for a state of a purifier of one's own that has none."""
    return getattr(state, "iteration", getattr(state, "step", -1))


class StepHooks:
    """An ordered set of hooks that belongs to one object: copies and pickles of it start empty."""

    def __init__(self) -> None:
        self._hooks: OrderedDict[int, StepHook] = OrderedDict()

    def register(
        self, function: Callable[[Any], Any], steps: Container[int] | None = None, live: bool = False
    ) -> RemovableHandle:
        """Add a hook behind the others. The handle removes it, also at the end of a ``with`` block."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = StepHook(function, steps, live)
        return handle

    def __iter__(self) -> Iterator[StepHook]:
        return iter(tuple(self._hooks.values()))

    def __len__(self) -> int:
        return len(self._hooks)

    def __reduce__(self) -> tuple[type[StepHooks], tuple[()]]:
        return (StepHooks, ())


def together(hooks: Sequence[StepHook]) -> Callable[[Any], Any] | None:
    """Several hooks as one function, each called at its own steps; None when there are none.

    It raises ``InputValueError`` when more than one hook replaces the state of a step.
    """
    if not hooks:
        return None

    def run(state: Any) -> Any:
        replaced = [returned for returned in (hook(state) for hook in hooks) if returned is not None]
        if len(replaced) > 1:
            raise InputValueError(f"{len(replaced)} step hooks replaced the state of one step; only one may.")
        return replaced[0] if replaced else None

    return run


class Trajectory:
    """The images at every few steps of a purification: of CMAP the generated ones, of a purifier that adds noise and
    denoises those with their noise. Of a chain it keeps those of the last purifier.

        trajectory = Trajectory()
        result = model.purify(images, callback=trajectory)
        trajectory.animate("purification.gif", result)

    Args:
        every: steps from one frame to the next.

    Attributes:
        frames: [B, K, C, H, W] each, on the CPU, in [0, 1] but for their noise. An image that has stopped stays as it
            was.
        inputs: [B, C, H, W] in [0, 1]; None before the first step.

    Raises:
        SettingsError: ``every`` is no integer above 0.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = require_integer("Trajectory", "every", every, minimum=1)
        self.frames: list[Tensor] = []
        self.inputs: Tensor | None = None
        self._last = -1

    def __call__(self, state: LatentState | StepState) -> None:
        if isinstance(state, StepState):
            inputs, images, rows = state.inputs, state.images, slice(None)
        else:
            inputs, images, rows = state.images, state.generated, state.image_indices
        step = step_of(state)
        if not self.frames or step <= self._last:  # another purification
            self.frames, self.inputs = [], inputs.detach().cpu()
        self._last = step
        if step % self.every == 0 or not self.frames:
            images = (images.detach().cpu().float() + 1) / 2
            frame = torch.empty_like(images) if not self.frames else self.frames[-1].clone()
            frame[rows] = images
            self.frames.append(frame)

    def animate(
        self,
        path: str | Path,
        result: PurificationResult | None = None,
        *,
        milliseconds: int = 100,
        scale: int | None = None,
    ) -> Path:
        """Write a GIF: a row for each image, the input first, then its K versions as they change.

        Args:
            path: of the file.
            result: of the same purification, for a last frame; None for none, as steps are seen before they are made.
            milliseconds: of a frame.
            scale: pixels of the picture per pixel of an image; None for images of about 96 pixels.

        Raises:
            SettingsError: no purification has been watched.
            InputValueError: the result is of other images.
        """
        if not self.frames:
            raise SettingsError("There is nothing to animate: first model.purify(images, callback=trajectory).")
        frames, shape = list(self.frames), self.frames[-1].shape
        if result is not None:
            last = resize_images(result.images.detach().cpu().float().flatten(0, 1), shape[-2:], "bilinear")
            if last.shape != (shape[0] * shape[1], *shape[2:]):
                raise InputValueError(
                    f"The result has {len(last)} purified images, but {shape[0] * shape[1]} were seen."
                )
            frames.append(last.view(shape))
        pictures = [version_grid(frame, self.inputs, scale=scale) for frame in frames]
        return write_animation(pictures, path, milliseconds=milliseconds)
