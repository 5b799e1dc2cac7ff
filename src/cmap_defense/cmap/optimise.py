"""Algorithm 1 of arXiv 2412.08394: N Adam steps on the latents, as a pure function.

The loop knows a ``generate`` function, images and latents; no modules, devices or seeds. It minimises K L, the sum
over the K latents, so that Adam's eps means the same for every K. Latents and losses keep the latents' precision;
``generate`` may run in another. Images that stop early leave the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.cmap.adam import AdamState, adam_step
from cmap_defense.cmap.losses import ObjectiveTerms
from cmap_defense.cmap.objective import Generate, LatentObjective
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.stopping import Predict, Stopping
from cmap_defense.errors import BackboneError, InputValueError
from cmap_defense.results import History


@dataclasses.dataclass(frozen=True)
class LatentState:
    """What a callback sees: iteration n before its step. They are the loop's own tensors, so do not change them in
    place: return new latents instead. All are detached, except for a live hook, whose states are part of the graph.

    Attributes:
        iteration: n, from 0.
        latents: [B, K, C, H, W], unit, of the B images that have not stopped.
        generated: G(latents), [B, K, C, H, W] in [-1, 1].
        terms: the objective there.
        images: the inputs [B, C, H, W] in [0, 1].
        image_indices: [B] on the CPU, the position of each image in the caller's batch.
        gradient: [B, K, C, H, W], of K times the objective with respect to the latents, which Adam is given; None for a
            live hook whose states are part of the graph: take it from ``terms``.
    """

    iteration: int
    latents: Tensor
    generated: Tensor
    terms: ObjectiveTerms
    images: Tensor
    image_indices: Tensor
    gradient: Tensor | None = None


Callback = Callable[[LatentState], "Tensor | None"]
"""Called before every step; latents that it returns replace the state's, and are evaluated in their place;
Adam keeps its moments."""


def optimise_latents(
    generate: Generate,
    images: Tensor,
    latents: Tensor,
    settings: CMAPSettings,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    max_parallel: int | None = None,
    predict: Predict | None = None,
) -> tuple[Tensor, History]:
    """Minimise eq. 9 over the latents of every image.

    Args:
        generate: the generator, see ``Generate``; gradients must flow from its output
            to its input.
        images: [B, C, H, W] in [0, 1].
        latents: [B, K, C, H, W], where to start; unit, float32 or float64.
        settings: the constants.
        class_labels: [B, K] integers, each handed to ``generate`` along with its latent; None for none.
        callback: see ``Callback``.
        max_parallel: latents per call of ``generate``; None for all B K at once. It changes memory, not the result
            beyond rounding.
        predict: see ``Predict``; needed where the settings have ``stop_agreement``.

    Returns:
        The latents after N steps, or those after which an image stopped, and the ``History`` of the evaluations before
        each step.

    Raises:
        InputValueError: images and latents do not fit each other.
        BackboneError: ``generate`` returned another shape, something without a gradient, or values that are not finite.
    """
    if latents.ndim != 5 or images.ndim != 4 or (len(latents), *latents.shape[2:]) != tuple(images.shape):
        raise InputValueError(
            "Latents must be [B, K, C, H, W] for images [B, C, H, W], "
            f"but are {list(latents.shape)} for {list(images.shape)}."
        )
    latents = latents.detach()
    images = images.detach().to(latents.dtype)
    objective = LatentObjective(
        generate, images, latents.shape[1], settings, class_labels=class_labels, max_parallel=max_parallel
    )
    return minimise(objective, latents, callback=callback, predict=predict)


def minimise(
    objective: LatentObjective, start: Tensor, *, callback: Callback | None = None, predict: Predict | None = None
) -> tuple[Tensor, History]:
    """All steps of an objective from ``start``; see ``optimise_latents``."""
    rows: list[HistoryRow] = []
    state, settings = LoopState(start.detach(), AdamState.start(start)), objective.settings
    stopping = Stopping(settings, start.shape, predict)
    found = run_loop(objective, state, settings.iterations, stopping, callback=callback, rows=rows).latents
    return found, history_of(rows, found, settings)


def history_of(rows: list[HistoryRow], latents: Tensor, settings: CMAPSettings) -> History:
    """The history of rows that ``run_loop`` filled: [N, B], NaN after an image's stop.

    Raises:
        BackboneError: the objective or the latents became NaN or infinite.
    """
    names = [field.name for field in dataclasses.fields(History)]
    values = latents.new_full((len(names), settings.iterations, len(latents)), math.nan)
    finite = torch.isfinite(latents).all()
    for n, (going, row) in enumerate(rows):
        values[:, n, slice(None) if going is None else going] = torch.stack(row)
        finite &= torch.isfinite(row[names.index("total")]).all()
    if not finite:
        raise BackboneError(
            "The backbone's images or their gradients became NaN or infinite during the optimisation. "
            "A backbone in float16 overflows easily: use bfloat16 or float32."
        )
    return History(*values)


@dataclasses.dataclass(frozen=True)
class LoopState:
    """Where the loop is: the latents and Adam's state, whose step counts the iterations."""

    latents: Tensor
    adam: AdamState

    def take(self, rows: Tensor) -> LoopState:
        """The state of some images."""
        return LoopState(self.latents[rows], self.adam.take(rows))

    def put(self, rows: Tensor, after: LoopState) -> LoopState:
        """The state with that of some images replaced."""
        first, second = put(self.adam.first, rows, after.adam.first), put(self.adam.second, rows, after.adam.second)
        return LoopState(put(self.latents, rows, after.latents), AdamState(after.adam.step, first, second))


HistoryRow = tuple["Tensor | None", tuple[Tensor, ...]]
"""The images that made an iteration, None for all, and what ``History`` has of them."""


def put(whole: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """``whole`` with ``values`` at positions ``rows``; nothing is changed in place."""
    copy = whole.clone()
    copy[rows] = values
    return copy


def run_loop(
    objective: LatentObjective,
    state: LoopState,
    iterations: int,
    stopping: Stopping,
    *,
    callback: Callback | None = None,
    rows: list[HistoryRow] | None = None,
    visit: Callable[[LoopState, Tensor, bool, Tensor | None], None] | None = None,
) -> LoopState:
    """Some iterations of the loop from ``state``, as far as images have not stopped.

    Args:
        objective: of the whole batch.
        state: likewise.
        iterations: at most.
        stopping: which images make an iteration.
        callback: see ``Callback``.
        rows: gets one row of the history per iteration.
        visit: called before each step with the state that it starts from, the gradient there, whether a callback
            replaced the latents, and the positions of the images that make the step, None for all.

    Returns:
        The state of the whole batch.
    """
    part, going = objective, None
    for n in range(state.adam.step, state.adam.step + iterations):
        now = stopping.rows(n)
        if now is not None and (going is None or len(now) < len(going)):
            going, part = now, objective.take(now)
        if going is not None and not len(going):
            break
        at = state if going is None else state.take(going)
        latents, adam, checked = at.latents, at.adam, stopping.checks_labels(n)
        terms, gradient, generated = part.gradient(latents, keep_images=checked or callback is not None)
        replaced = None
        if callback is not None:
            indices = torch.arange(len(latents), device="cpu") if going is None else going
            replaced = callback(LatentState(n, latents, generated, terms, part.images, indices, gradient))
            if replaced is not None:
                latents = check_replaced(replaced, latents).detach()
                terms, gradient, generated = part.gradient(latents, keep_images=checked)
        if rows is not None:
            rows.append((going, _history_row(terms, latents)))
        if visit is not None:
            visit(LoopState(latents, adam), gradient, replaced is not None, going)
        stopping.observe(n, going, terms, generated)
        after = LoopState(*adam_step(latents, gradient, adam, objective.settings))
        state = after if going is None else state.put(going, after)
    return state


def _history_row(terms: ObjectiveTerms, latents: Tensor) -> tuple[Tensor, ...]:
    elements = latents.flatten(1)
    return (terms.l1.mean(1), terms.ssim.mean(1), terms.latent, terms.total, elements.mean(1), elements.std(1))


def check_replaced(replaced: Tensor, latents: Tensor) -> Tensor:
    """What a callback returned in place of latents or images, on their device and in their precision, or an
    ``InputValueError``."""
    if not isinstance(replaced, Tensor) or replaced.shape != latents.shape:
        came = list(replaced.shape) if isinstance(replaced, Tensor) else type(replaced).__name__
        raise InputValueError(
            f"A callback must return None or a tensor shaped {list(latents.shape)}, but returned {came}."
        )
    return replaced.to(latents)
