"""Auto-PGD, by the authors' library."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.libraries import (
    LOGGER,
    NORMS,
    LibraryModel,
    pyautoattack,
    undisturbed,
)
from cmap_defense.attacks.oracle import Model, Oracle, differentiates_defence, require_gradient
from cmap_defense.attacks.steps import random_point
from cmap_defense.common.rng import derived_seeds
from cmap_defense.common.settings import setting
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import GradientMode

START = 0xA96D
"""Number that gives the start noise of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """APGD (Croce and Hein 2020, arXiv 2003.01690, Algorithm 1): the step size is halved where the loss stops rising.

    It is ``APGDAttack`` of pyautoattack, the extra ``[attacks]``. All images are attacked for all steps, those included
    that a random model misclassifies at first, which the library's own ``perturb`` leaves unperturbed. Starts are drawn
    per image, so that for a purified classifier the outcome for an image does not depend on its batch. The library
    averages gradients over ``eot`` evaluations, but measures its progress by the loss of the last of them alone.

    The attempts are the image of the highest loss and, without targets, the last misclassified one. Its history holds
    "margin", the mean ``margin`` over the evaluations, and "reached", the share of them
    that reached the goal, at the start and after each step. Further arguments are those of
    ``Attack``.

    Args:
        steps: number of steps, at least 1; each takes ``eot`` evaluations, and so does the start.
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
    gradient: GradientMode | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_gradient("APGD", self.gradient)

    def differentiates_defence(self, model: Model) -> bool:
        return differentiates_defence(self.gradient, model)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        targeted = goal.targets is not None
        if targeted and self.loss == "dlr":
            raise SettingsError(
                'APGD takes targets with loss="ce" only; PGD(..., loss=Margin()) and Square take them too.'
            )
        oracle = oracle.in_mode(self.gradient, self)
        evaluate, rows = LibraryModel(oracle, clean, classes=3 if self.loss == "dlr" else 2), []

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
        margins, reached = (
            torch.stack(column).unflatten(0, (-1, self.eot)).mean(dim=1) for column in zip(*rows, strict=True)
        )
        return Candidates(found, {"margin": margins, "reached": reached})
