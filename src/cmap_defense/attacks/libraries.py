"""The library pyautoattack, the extra ``[attacks]``, for the attacks that use it; imported when needed."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks.oracle import Oracle
from cmap_defense.common.optional import optional_import
from cmap_defense.common.rng import generator_for
from cmap_defense.errors import GradientError, SettingsError

NORMS = {"linf": "Linf", "l2": "L2"}
"""The library's names for ours."""

LOGGER = logging.getLogger("auto-attack")
"""The library's own."""


def pyautoattack() -> Any:
    """The library. Raises ``MissingExtraError`` where it is not installed."""
    return optional_import("pyautoattack", "attacks", "This attack is one of the pyautoattack library")


class LibraryModel:
    """A model for the library: images [M, C, H, W] to logits [M, classes], in float32.

    Its backward pass reaches the images and nothing else: FAB calls ``backward``, which would leave gradients in the
    model's weights.

    Args:
        model: images to logits.
        clean: the images, for their precision.
        classes: the number of classes that the library's losses need.

    Raises:
        SettingsError: in a call, the model has fewer.
        GradientError: in a call, the logits do not depend on the images for autograd, and the library needs a gradient.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], clean: Tensor, *, classes: int = 2) -> None:
        self.model, self.dtype, self.classes = model, clean.dtype, classes

    def __call__(self, images: Tensor) -> Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            logits: Any = _ToImages.apply(images, self._logits)
            return logits
        return self._logits(images).clone()  # Square writes into it

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.model(images.to(self.dtype))
        if logits.shape[1] < self.classes:
            raise SettingsError(
                f"The DLR loss needs {self.classes} classes at least, but the model has {logits.shape[1]}: "
                'use APGD(..., loss="ce") or PGD.'
            )
        return logits.to(images.dtype)


class _ToImages(torch.autograd.Function):
    """A model's logits, with a gradient to the images alone."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = images.detach().requires_grad_()
            ctx.logits = model(ctx.leaf)
        if not ctx.logits.requires_grad:
            raise GradientError(
                "This attack needs a gradient, but the model's logits do not depend on the images for autograd."
            )
        return ctx.logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        (gradient,) = torch.autograd.grad(ctx.logits, ctx.leaf, grad_outputs[0], retain_graph=True)
        return gradient, None


def seed_of(oracle: Oracle) -> int:
    """A seed of the library's noise, which depends on the images, the attack's seed and the number of evaluations."""
    return generator_for(oracle.count, *oracle.draws.tolist()).initial_seed()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore what the library changes in the process: the trace function and the counts that it makes with it.

    Its logger is silent in here, unless a handler takes its messages.
    """
    counted = pyautoattack().checks.funcs
    trace, level, counts = sys.gettrace(), LOGGER.level, dict(counted)
    counted.update(dict.fromkeys(counted, 0))  # the library never does
    if not LOGGER.hasHandlers():
        LOGGER.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        sys.settrace(trace)
        LOGGER.setLevel(level)
        counted.update(counts)
