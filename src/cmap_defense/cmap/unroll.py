"""The gradient through the latent loop: every Adam step with its moments, bias correction, clip, SSIM and L1.

Reverse mode, step by step, by hand: the state before each step is enough to go back through it. With u' = A(u, g, m, v)
and g = d(K L)/du at (u, x), a cotangent of the state after a step becomes one of the state before by A's own
derivatives and two second-order products, H c and (d^2(K L)/du dx)^T c, c being the cotangent of g. No graph of the
whole loop is ever kept: memory holds the states of some steps and the graph of one chunk of latents. The iterations
that an image made before it stopped are constants of the derivative.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cmap_defense.cmap.adam import AdamState, adam_step
from cmap_defense.cmap.objective import LatentObjective, latent_chunks, objective_terms
from cmap_defense.cmap.optimise import Callback, HistoryRow, LatentState, LoopState, check_replaced, put, run_loop
from cmap_defense.cmap.stopping import Predict, Stopping
from cmap_defense.common.settings import setting


@dataclasses.dataclass(frozen=True)
class Backward:
    """How the way back through the loop is taken.

    Attributes:
        last: steps to go back through, from an image's last; None for all.
        checkpoint: keep the states of about sqrt(N) steps and compute the others again, instead of keeping all N.
        l1_smoothing: d of L1 in the second derivatives.
        max_growth: None for the exact derivative. Otherwise the cotangent of each latent is scaled down to this many
            times its length at the end of the loop wherever it is longer; a chaotic loop drowns the signal otherwise.
    """

    last: int | None = setting(None, minimum=1)
    checkpoint: bool = setting(True)
    l1_smoothing: float = setting(0.05, minimum=0.0)
    max_growth: float | None = setting(None, above=0.0)


def unrolled_latents(
    objective: LatentObjective,
    images: Tensor,
    start: Tensor,
    *,
    backward: Backward,
    callback: Callback | None = None,
    live: Callback | None = None,
    live_at: Callable[[int], bool] = lambda iteration: True,
    rows: list[HistoryRow] | None = None,
    predict: Predict | None = None,
) -> Tensor:
    """The latents after all steps, as a differentiable function of the images.

    Args:
        objective: of the images.
        images: [B, C, H, W] in [0, 1], those of the objective, with their graph.
        start: [B, K, C, H, W], the initial latents; constants here.
        backward: how.
        callback: sees detached states, once an iteration; a replacement cuts the gradient at that point.
        live: sees states that are part of the graph, at the iterations that ``live_at`` says; latents that it returns
            stay part of it.
        rows: gets the history.
        predict: see ``optimise_latents``.
    """
    total = objective.settings.iterations
    stopping = Stopping(objective.settings, start.shape, predict)
    whole = backward.last is None or objective.settings.stops  # where the last steps begin is known at the end
    tail = total if whole else min(backward.last or total, total)
    head = total - tail
    stops = {n for n in range(total) if live is not None and live_at(n)}
    state = LoopState(start.detach(), AdamState.start(start))
    bound = _Bound()
    latents, first, second = state.latents, state.adam.first, state.adam.second
    length = max(1, math.ceil(math.sqrt(tail)) if backward.checkpoint else tail)
    cuts = sorted({0, head, total} | stops | set(range(head, total, length)))
    for begin, end in itertools.pairwise(cuts):
        if not bool((stopping.made > begin).any()):
            break
        if begin in stops:
            assert live is not None
            latents = _called(live, objective, images, latents, begin, backward, stopping.rows(begin))
        if begin < head and not latents.requires_grad:
            state = LoopState(latents, AdamState(begin, first, second))
            state = run_loop(objective, state, end - begin, stopping, callback=callback, rows=rows)
            latents, first, second = state.latents, state.adam.first, state.adam.second
        else:
            plan = _Plan(objective, begin, end - begin, backward, bound, stopping, callback, rows)
            latents, first, second = _Segment.apply(latents, first, second, images, plan)
    return bound.watch(latents)


def _called(
    live: Callback,
    objective: LatentObjective,
    images: Tensor,
    whole: Tensor,
    iteration: int,
    backward: Backward,
    rows: Tensor | None,
) -> Tensor:
    """The latents of the batch after a live hook: its own, of the images at ``rows``, where it returned some."""
    latents, indices = whole, torch.arange(len(images), device="cpu")
    if rows is not None:
        objective, images, latents, indices = objective.take(rows), images[rows], whole[rows], rows
    with torch.enable_grad():
        inside = latents if latents.requires_grad else latents.detach().requires_grad_()
        generated = generate_with_gradient(objective, inside, images)
        smoothing = max(backward.l1_smoothing, objective.settings.l1_smoothing)
        terms = objective_terms(inside, generated, images, objective.settings, l1_smoothing=smoothing)
        replaced = live(LatentState(iteration, inside, generated, terms, images, indices))
        if replaced is None:
            return whole
        replaced = check_replaced(replaced, latents)
        return replaced if rows is None else put(whole, rows, replaced)


def generate_with_gradient(objective: LatentObjective, latents: Tensor, images: Tensor) -> Tensor:
    """The images [B, K, C, H, W] in [-1, 1] of latents, differentiable once in both; memory holds the graph of one
    chunk, in the backward pass. ``images`` are those of the objective, with their graph."""
    return _Generate.apply(latents, None if objective.inputs is None else images, objective)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One segment: some steps of the loop from iteration ``begin``."""

    objective: LatentObjective
    begin: int
    steps: int
    backward: Backward
    bound: _Bound
    stopping: Stopping
    callback: Callback | None
    rows: list[HistoryRow] | None

    def run(self, start: Sequence[Tensor], stopping: Stopping, **watched: Any) -> tuple[LoopState, list[_Visited]]:
        """The segment from (u, m, v): its end, and what it went through."""
        visited: list[_Visited] = []
        latents, first, second = (tensor.detach() for tensor in start)
        entry = LoopState(latents, AdamState(self.begin, first, second))
        watched["visit"] = lambda *seen: visited.append(_Visited(*seen))
        return run_loop(self.objective, entry, self.steps, stopping, **watched), visited

    def counts(self) -> bool:
        """Whether the way back goes through a step of this segment."""
        made, last = self.stopping.made, self.backward.last
        if last is None or not self.stopping.settings.stops:
            return True
        return bool(((made - last < self.begin + self.steps) & (made > self.begin)).any())


@dataclasses.dataclass(frozen=True)
class _Visited:
    """The state before a step, the gradient there, whether a callback put these latents in place, and whose they are:
    positions of images in the batch, None for all."""

    state: LoopState
    gradient: Tensor
    replaced: bool
    rows: Tensor | None

    def last(self, stopping: Stopping, count: int | None) -> _Visited:
        """The same of the images that make this step among their last ``count``."""
        if count is None or not stopping.settings.stops:
            return self
        rows = torch.arange(len(stopping.made), device="cpu") if self.rows is None else self.rows
        kept = (stopping.made[rows] - count <= self.state.adam.step).nonzero().flatten()
        return _Visited(self.state.take(kept), self.gradient[kept], self.replaced, rows[kept])


class _Segment(torch.autograd.Function):
    """(u, m, v, images) to (u, m, v) some steps later."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, first: Tensor, second: Tensor, images: Tensor, plan: _Plan) -> Any:
        start = (latents, first, second)
        end, visited = plan.run(start, plan.stopping, callback=plan.callback, rows=plan.rows)
        ctx.plan = plan
        ctx.replaced = {v.state.adam.step: v.state.latents for v in visited if v.replaced}
        ctx.visited = None if plan.backward.checkpoint else visited
        ctx.save_for_backward(*start)
        return end.latents.view_as(end.latents), end.adam.first, end.adam.second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(cotangents[0].device.type, enabled=False):  # the backbone alone gets the caller's
            return _Segment._backward(ctx, cotangents)

    @staticmethod
    def _backward(ctx: Any, cotangents: tuple[Tensor, ...]) -> Any:
        plan: _Plan = ctx.plan
        if not plan.counts():
            return (*cotangents, None, None)
        visited = ctx.visited
        if visited is None:
            again = (lambda state: ctx.replaced.get(state.iteration)) if ctx.replaced else None
            _, visited = plan.run(ctx.saved_tensors, plan.stopping.decided(), callback=again)
        to_images = torch.zeros_like(plan.objective.images)
        for step in reversed(visited):
            cotangents = _back(plan, step.last(plan.stopping, plan.backward.last), cotangents, to_images)
        return (*cotangents, to_images, None)


def _back(plan: _Plan, visited: _Visited, whole: tuple[Tensor, ...], to_images: Tensor) -> tuple[Tensor, ...]:
    """Cotangents of the state after a step to those of the state before it; the step's part is added to ``to_images``.

    Images that do not make the step keep their cotangents.
    """
    rows, cotangents, objective = visited.rows, whole, plan.objective
    if rows is not None:
        if not len(rows):
            return whole
        cotangents, objective = tuple(c[rows] for c in whole), objective.take(rows)
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_()
            for t in (visited.state.latents, visited.gradient, visited.state.adam.first, visited.state.adam.second)
        ]
        adam = AdamState(visited.state.adam.step, leaves[2], leaves[3])
        moved, after = adam_step(leaves[0], leaves[1], adam, plan.objective.settings)
        outputs = (moved, after.first, after.second)
        to_latents, to_gradient, to_first, to_second = torch.autograd.grad(
            outputs, leaves, cotangents, materialize_grads=True
        )
    product, mixed = objective.products(visited.state.latents, to_gradient, l1_smoothing=plan.backward.l1_smoothing)
    to_latents = torch.zeros_like(product) if visited.replaced else to_latents + product
    before = plan.bound.limit((to_latents, to_first, to_second), plan.backward.max_growth, rows)
    if rows is None:
        to_images += mixed
        return before
    to_images[rows] += mixed
    return tuple(put(c, rows, new) for c, new in zip(whole, before, strict=True))


class _Bound:
    """Keeps the cotangents of each latent from growing without bound, where ``max_growth`` is set."""

    def __init__(self) -> None:
        self.length: Tensor | None = None

    def watch(self, latents: Tensor) -> Tensor:
        """``latents``; the length of their cotangents is noted when the way back begins."""
        if latents.requires_grad:
            latents.register_hook(self._note)
        return latents

    def _note(self, cotangent: Tensor) -> None:
        self.length = cotangent.detach().flatten(2).norm(dim=2)

    def limit(self, cotangents: tuple[Tensor, ...], growth: float | None, rows: Tensor | None) -> tuple[Tensor, ...]:
        """The cotangents of (u, m, v) of the images at ``rows``, all three scaled alike for each latent."""
        if growth is None or self.length is None:
            return cotangents
        now = cotangents[0].flatten(2).norm(dim=2)
        length = self.length if rows is None else self.length[rows]
        scale = (growth * length / now.clamp_min(torch.finfo(now.dtype).tiny)).clamp_max(1)[:, :, None, None, None]
        return tuple(c * scale for c in cotangents)


class _Generate(torch.autograd.Function):
    """The images of latents, their graph made again in the backward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, inputs: Tensor | None, objective: LatentObjective) -> Tensor:
        ctx.objective = objective
        ctx.save_for_backward(latents, inputs)
        return objective.images_of(latents.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (latents, inputs), objective = ctx.saved_tensors, ctx.objective
        differentiated = 1 if inputs is None else 2
        gradients = []
        chunks = latent_chunks(latents, objective.class_labels, objective.chunk, inputs)
        for given, part in zip(chunks, cotangents[0].flatten(0, 1).split(objective.chunk), strict=True):
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in given[:differentiated]]
                images = objective.generate(*leaves, *given[differentiated:])
                gradients.append(torch.autograd.grad(images, leaves, part.to(images.dtype)))
        to_latents, *to_inputs = (torch.cat(column).view_as(latents) for column in zip(*gradients, strict=True))
        return to_latents, to_inputs[0].sum(dim=1) if to_inputs else None, None
