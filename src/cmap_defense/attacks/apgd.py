"""Auto-PGD (Croce and Hein 2020, arXiv 2003.01690, section 3), by the authors' library."""

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
    require_gradient,
    undisturbed,
)
from cmap_defense.attacks.oracle import Model, Oracle, differentiates_defence
from cmap_defense.attacks.steps import random_point
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import GradientMode
from cmap_defense.rng import derived_seeds
from cmap_defense.settings import require_choice, require_integer

__all__ = ["APGD"]

START = 0xA96D
"""Sets the noise of the start apart from the model's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Projected gradient steps with momentum, whose size is halved where the loss no longer rises.

    It is ``APGDAttack`` of pyautoattack, the extra ``[attacks]``. All images are attacked for all steps, those too that
    a random model gets wrong at first; the library's own ``perturb`` leaves these alone. Starts are drawn per image, so
    that for a purified classifier an image's outcome does not depend on its batch.

    The library averages gradients over ``eot`` evaluations, but takes the last of them alone for the loss by which it
    judges its progress.

    Args:
        steps: 1 at least; each takes ``eot`` evaluations, and so does the start.
        eot: evaluations per gradient, with noise of their own.
        loss: "ce", the cross-entropy, or "dlr", the difference of logits ratio of section 4, for 3 classes at least.
            For targets only "ce": the library's targeted ratio is raised by making all logits alike, without the
            target's coming out on top.
        gradient: the gradient mode of a purified classifier during the search; None for its own.

    Other arguments: :class:`~cmap_defense.attacks.base.Attack`. It attempts the image of the highest loss and, without
    targets, the last one that was answered wrongly.

    history: "margin", :func:`~cmap_defense.attacks.goal.margin` on average over the evaluations, and "reached", the
    share of them that ended as the attack wants, at the start and after each step.

    Raises:
        SettingsError: a value is out of its range; "dlr" with targets, or with fewer than 3 classes.
        MissingExtraError: pyautoattack is not installed.
    """

    steps: int = 100
    eot: int = 1
    loss: str = "ce"
    gradient: GradientMode | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("APGD", "steps", self.steps, minimum=1)
        require_integer("APGD", "eot", self.eot, minimum=1)
        require_choice("APGD", "loss", self.loss, ("ce", "dlr"))
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
        shown, rows = LibraryModel(oracle, clean, classes=3 if self.loss == "dlr" else 2), []

        def model(images: Tensor) -> Tensor:
            logits = shown(images)
            answers = logits.detach()
            rows.append((margin(answers, goal), goal.reached(answers.argmax(dim=1)).to(answers)))
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
