"""Algorithm 1 of arXiv 2412.08394: N Adam steps on the latents, as a pure function.

The loop knows a ``generate`` function, images and latents; no modules, devices or seeds. It minimises K L, the sum
over the K latents, so that Adam's eps means the same for every K. Latents and losses keep the latents' precision;
``generate`` may run in another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.cmap.adam import AdamState, adam_step
from cmap_defense.cmap.losses import ObjectiveTerms
from cmap_defense.cmap.objective import Generate, LatentObjective, generate_in_chunks
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.errors import BackboneError, InputValueError
from cmap_defense.results import History

__all__ = [
    "Callback",
    "Generate",
    "LatentState",
    "LoopState",
    "check_replaced",
    "generate_in_chunks",
    "history_of",
    "minimise",
    "optimise_latents",
    "run_loop",
]


@dataclasses.dataclass(frozen=True)
class LatentState:
    """What a callback sees: iteration n before its step. They are the loop's own tensors, so do not change them in
    place: return new latents instead. All are detached, except for a live hook, whose states are part of the graph.

    Attributes:
        iteration: n, from 0.
        latents: [B, K, C, H, W], unit.
        generated: G(latents), [B, K, C, H, W] in [-1, 1].
        terms: the objective there.
        images: the inputs [B, C, H, W] in [0, 1].
        image_indices: [B] on the CPU, the position of each image in the caller's batch.
    """

    iteration: int
    latents: Tensor
    generated: Tensor
    terms: ObjectiveTerms
    images: Tensor
    image_indices: Tensor


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

    Returns:
        The latents after N steps, and the ``History`` of the N evaluations before each step.

    Raises:
        InputValueError: images and latents do not fit each other.
        BackboneError: ``generate`` returned another shape, something without a gradient, or values that are not finite.
    """
    if (
        latents.ndim != 5
        or images.ndim != 4
        or latents.shape[0] != images.shape[0]
        or latents.shape[2:] != images.shape[1:]
    ):
        raise InputValueError(
            "Latents must be [B, K, C, H, W] for images [B, C, H, W], "
            f"but are {list(latents.shape)} for {list(images.shape)}."
        )
    latents = latents.detach()
    images = images.detach().to(latents.dtype)
    objective = LatentObjective(
        generate, images, latents.shape[1], settings, class_labels=class_labels, max_parallel=max_parallel
    )
    return minimise(objective, latents, callback=callback)


def minimise(objective: LatentObjective, start: Tensor, *, callback: Callback | None = None) -> tuple[Tensor, History]:
    """All N steps of an objective from ``start``; see ``optimise_latents``."""
    rows: list[tuple[Tensor, ...]] = []
    state = LoopState(start.detach(), AdamState.start(start))
    latents = run_loop(objective, state, objective.settings.iterations, callback=callback, rows=rows).latents
    return latents, history_of(rows, latents)


def history_of(rows: list[tuple[Tensor, ...]], latents: Tensor) -> History:
    """The history of rows that ``run_loop`` filled.

    Raises:
        BackboneError: the objective or the latents became NaN or infinite.
    """
    columns = (
        zip(*rows, strict=True) if rows else [[latents.new_empty(len(latents))]] * len(dataclasses.fields(History))
    )
    history = History(*(torch.stack(list(column))[: len(rows)] for column in columns))
    if not (torch.isfinite(history.total).all() and torch.isfinite(latents).all()):
        raise BackboneError(
            "The backbone's images or their gradients became NaN or infinite during the optimisation. "
            "A backbone in float16 overflows easily: use bfloat16 or float32."
        )
    return history


@dataclasses.dataclass(frozen=True)
class LoopState:
    """Where the loop is: the latents and Adam's state, whose step counts the iterations."""

    latents: Tensor
    adam: AdamState


def run_loop(
    objective: LatentObjective,
    state: LoopState,
    iterations: int,
    *,
    callback: Callback | None = None,
    rows: list[tuple[Tensor, ...]] | None = None,
    visit: Callable[[LoopState, Tensor, bool], None] | None = None,
) -> LoopState:
    """Some iterations of the loop from ``state``.

    Args:
        callback: see ``Callback``.
        rows: gets one row of the history per iteration.
        visit: called before each step with the state that it starts from, the gradient there, and whether a callback
            replaced the latents.
    """
    settings = objective.settings
    indices = torch.arange(len(objective.images), device="cpu")
    for _ in range(iterations):
        latents, adam = state.latents, state.adam
        terms, gradient, generated = objective.gradient(latents, keep_images=callback is not None)
        replaced = None
        if callback is not None:
            replaced = callback(LatentState(adam.step, latents, generated, terms, objective.images, indices))
            if replaced is not None:
                latents = check_replaced(replaced, latents).detach()
                terms, gradient, _ = objective.gradient(latents)
        if rows is not None:
            rows.append(_history_row(terms, latents))
        if visit is not None:
            visit(LoopState(latents, adam), gradient, replaced is not None)
        state = LoopState(*adam_step(latents, gradient, adam, settings))
    return state


def _history_row(terms: ObjectiveTerms, latents: Tensor) -> tuple[Tensor, ...]:
    elements = latents.flatten(1)
    return (terms.l1.mean(1), terms.ssim.mean(1), terms.latent, terms.total, elements.mean(1), elements.std(1))


def check_replaced(replaced: Tensor, latents: Tensor) -> Tensor:
    """Latents that a callback returned, on the loop's device and in its precision, or an ``InputValueError``."""
    if not isinstance(replaced, Tensor) or replaced.shape != latents.shape:
        came = list(replaced.shape) if isinstance(replaced, Tensor) else type(replaced).__name__
        raise InputValueError(
            f"A callback must return None or latents shaped {list(latents.shape)}, but returned {came}."
        )
    return replaced.to(latents)
