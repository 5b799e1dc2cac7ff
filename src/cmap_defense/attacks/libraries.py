"""APGD and Square of the library pyautoattack, the extra ``[attacks]``, which is imported when it is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates, GradientAttack
from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.oracle import Oracle, finite_rows, gradient_length, gradient_to, raw_gradient
from cmap_defense.attacks.steps import random_point
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.optional import optional_import
from cmap_defense.common.rng import derived_seeds
from cmap_defense.common.settings import setting
from cmap_defense.errors import InputValueError, SettingsError
from cmap_defense.threat import ThreatModel

NORMS = {"linf": "Linf", "l2": "L2"}
"""The library's names for ours."""

LOGGER = logging.getLogger("auto-attack")
"""The library's own."""

START = 0xA96D
"""Number that gives APGD's start noise of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class APGD(GradientAttack):
    """APGD (Croce and Hein 2020, arXiv 2003.01690, Algorithm 1): the step size is halved where the loss stops rising.

    It is ``APGDAttack`` of pyautoattack, the extra ``[attacks]``. All images are attacked for all steps, those included
    that a random model misclassifies at first, which the library's own ``perturb`` leaves unperturbed. Starts are drawn
    per image, so that for a purified classifier the outcome for an image does not depend on its batch. The library
    averages gradients over ``eot`` evaluations, but measures its progress by the loss of the last of them alone.

    The attempts are the image of the highest loss and, without targets, the last misclassified one. Its history holds
    "margin", the mean ``margin`` over the evaluations, and "reached", the share of them that reached the goal, at the
    start and after each step; and "gradient_norm" (l2), of each evaluation. Further arguments are those of ``Attack``.

    Args:
        steps: number of steps; each takes ``eot`` evaluations, and so does the start.
        eot: evaluations with independent noise per gradient.
        loss: "ce" for the cross-entropy, or "dlr" for the difference of logits ratio (section 4), which needs 3
            classes. Targets need "ce", since the library's targeted ratio rises when all logits become equal.
        gradient: the gradient mode of a purified classifier during the search; None for its own.

    Raises:
        SettingsError: a value is out of its range; "dlr" with targets, or with fewer than 3 classes.
        MissingExtraError: pyautoattack is not installed.
    """

    steps: int = setting(100, minimum=1)
    eot: int = setting(1, minimum=1)
    loss: str = setting("ce", choices=("ce", "dlr"))

    def check_installed(self) -> None:
        pyautoattack()

    def predictions_per_image(self) -> int:
        return 1 if self.noise == "known" else self._evaluations

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return self._evaluations * model.purifier.passes

    @property
    def _evaluations(self) -> int:
        return self.restarts * (self.steps + 1) * self.eot

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        targeted = goal.targets is not None
        if targeted and self.loss == "dlr":
            raise SettingsError(
                'APGD takes targets with loss="ce" only; PGD(..., loss=Margin()) and Square take them too.'
            )
        oracle = oracle.in_mode(self.gradient, self)
        evaluate, rows = LibraryModel(oracle, clean, classes=3 if self.loss == "dlr" else 2, gradients_of=oracle), []

        def model(images: Tensor) -> Tensor:
            logits = evaluate(images)
            plain = logits.detach()
            rows.append((margin(plain, goal), goal.reached(plain.argmax(dim=1)).to(plain)))
            return logits

        attack = pyautoattack().autopgd_base.APGDAttack(
            model,
            n_iter=self.steps,
            norm=NORMS[self.threat.norm],
            eps=self.threat.eps,
            loss="ce-targeted-cfts" if targeted else self.loss,
            eot_iter=self.eot,
            device=clean.device,
            logger=LOGGER,
        )
        images = clean.float().contiguous()
        attack.init_hyperparam(images)
        start = random_point(self.threat, derived_seeds(oracle.draws, START + oracle.count), images)
        labels = goal.labels if goal.targets is None else goal.targets
        with undisturbed(), torch.no_grad():
            best, _, _, wrong = attack.attack_single_run(images, labels, x_init=start)
        found = torch.stack([best] if targeted else [best, wrong], dim=1)
        columns = (torch.stack(part).unflatten(0, (-1, self.eot)).mean(dim=1) for part in zip(*rows, strict=True))
        return Candidates(found, dict(zip(("margin", "reached"), columns, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049, Algorithm 1): random search without a gradient.

    Squares of the image change, and stay changed where the margin improves. It is the search of pyautoattack's
    ``SquareAttack``, the extra ``[attacks]``. Its loss is the margin of the mean probability over ``samples``
    evaluations with independent noise (EOT), towards the targets where there are some. All images are attacked, those
    included that a random model misclassifies at first.

    The best margin is the highest of many noisy ones, with a selection effect that falls with ``samples``. Squares are
    drawn from one stream for the batch. So unlike for most attacks here, the outcome for an image depends on its batch;
    attack one image per call where that matters. Its history holds "margin", the highest averaged margin so far, at the
    start and after each change. Further arguments are those of ``Attack``.

    Args:
        queries: changes to try. Each takes ``samples`` evaluations of the model, and so does the start.
        samples: evaluations with independent noise that are averaged.
        p_init: share of the pixels in the first squares. It falls on the paper's schedule (section 3), stretched to
            ``queries``.
        confidence: the margin at which the search on an image ends, 0 for the first success as in the paper; None for
            the last query, since one success on a random model may be chance.

    Raises:
        SettingsError: a value is out of its range.
        InputValueError: the norm is l2, and the library's start does not fit on images of this size.
        MissingExtraError: pyautoattack is not installed.
    """

    queries: int = setting(1000, minimum=1)
    samples: int = setting(4, minimum=1)
    p_init: float = setting(0.8, above=0.0, maximum=1.0)
    confidence: float | None = setting(None, minimum=0.0)

    def check_installed(self) -> None:
        pyautoattack()

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        require_tiles(self.threat, clean)
        highest, history = torch.full((len(clean),), -torch.inf, device=clean.device), []

        def lacking(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            """What the search takes for the margin to overcome, positive to go on, and the loss that it lowers."""
            model = LibraryModel(oracle.rows(rows).averaged(self.samples), clean)
            ahead = margin(model(images), goal.rows(rows))
            highest[rows] = torch.maximum(highest[rows], ahead)
            history.append(highest.clone())
            return (torch.ones_like(ahead) if self.confidence is None else self.confidence - ahead), -ahead

        attack = pyautoattack().square.SquareAttack(
            None,
            norm=NORMS[self.threat.norm],
            n_queries=self.queries,
            eps=self.threat.eps,
            p_init=self.p_init,
            resc_schedule=True,
            device=clean.device,
        )
        # In place of the library's, which writes into the logits, has no targets together with labels, and does not
        # know which images it gets, on which the noise depends. Its labels are positions in the batch instead.
        attack.margin_and_loss = lacking
        images = clean.float().contiguous()
        attack.init_hyperparam(images)
        _, found = attack.attack_single_run(images, torch.arange(len(clean), device=clean.device))
        return Candidates(found[:, None], {"margin": torch.stack(history)})


def require_tiles(threat: ThreatModel, images: Tensor) -> None:
    """Raises ``InputValueError`` where the library's start in l2, a grid of squares, does not fit on the images.

    Its squares have a side of a fifth of the height. It counts those that fit beginning at 0, but begins further in.
    """
    height, width = images.shape[2:]
    side = height // 5
    begin = (height - 5 * side) // 2
    fits = side == 1 or (side > 1 and all(begin + length // side * side <= length for length in (height, width)))
    if threat.norm == "l2" and not fits:
        raise InputValueError(
            f"Square Attack in l2 starts from a grid of squares, which pyautoattack cannot lay on images of "
            f"{height} x {width}. Use linf, or SPSA."
        )


def pyautoattack() -> Any:
    """The library. Raises ``MissingExtraError`` where it is not installed."""
    return optional_import("pyautoattack", "attacks", "APGD, AutoAttack and Square")


class LibraryModel:
    """A model for the library: images [M, C, H, W] to logits [M, classes], in float32.

    The inner model gets images in the precision of the ``clean`` ones. The backward pass reaches the images and nothing
    else: FAB calls ``backward``, which would leave gradients in the model's weights. A call raises ``SettingsError``
    where there are fewer than ``classes``, which the library's losses need. ``gradients_of`` remembers the lengths of
    the gradients, and which were finite.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        clean: Tensor,
        *,
        classes: int = 2,
        gradients_of: Oracle | None = None,
    ) -> None:
        self.model, self.dtype, self.classes, self.gradients_of = model, clean.dtype, classes, gradients_of

    def __call__(self, images: Tensor) -> Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            logits: Any = _ToImages.apply(images, self._logits, self.gradients_of)
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
    """A model's logits, with a gradient to the images alone: 0 for an image for which it is not finite."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: Callable[[Tensor], Tensor], gradients_of: Oracle | None) -> Tensor:
        ctx.gradients_of = gradients_of
        with torch.enable_grad():
            ctx.leaf = images.detach().requires_grad_()
            ctx.logits = model(ctx.leaf)
        if not ctx.logits.requires_grad:
            gradient_to(ctx.leaf, ctx.logits)  # which raises
        return ctx.logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        found = raw_gradient(ctx.leaf, ctx.logits, grad_outputs[0], retain_graph=True)
        gradient, finite = finite_rows(found)
        if ctx.gradients_of is not None:
            ctx.gradients_of.finite.append(finite)
            ctx.gradients_of.gradient_norms.append(gradient_length(gradient))
        return gradient, None, None


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
