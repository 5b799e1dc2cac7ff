"""What every attack does besides attacking: stay inside the threat model, and be judged afresh.

A subclass writes ``_run``; calling the attack then projects what came back and asks the model again, so that no
attack can report success on an image outside its ball, or on an answer that it saw while searching.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.errors import InputValueError
from cmap_defense.inputs import check_finite, check_images, check_unit_range
from cmap_defense.threat import ThreatModel

__all__ = ["Attack", "AttackResult", "Model"]

Model = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] in [0, 1] to logits [B, classes]."""


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """The outcome per image.

    images: [B, C, H, W] in [0, 1], inside the threat model. success: [B], whether the model's answer to them is
    wrong, asked once after the attack. distance: [B] in the threat model's norm. queries: model evaluations per
    image, the last one included.
    """

    images: Tensor
    success: Tensor
    distance: Tensor
    queries: int


class Attack(abc.ABC):
    """An attack on images -> logits under a threat model."""

    def __init__(self, threat: ThreatModel) -> None:
        self.threat = threat

    def __call__(self, model: Model, images: Tensor, labels: Tensor) -> AttackResult:
        """Attack every image.

        Args:
            model: images in [0, 1] to logits; its weights' gradients are left alone.
            images: float [B, C, H, W] in [0, 1].
            labels: int64 [B], the true classes.

        Raises:
            InputTypeError, InputValueError: images or labels are not as above.
        """
        check_finite(check_images(images))
        check_unit_range(images, inputs="unit")
        if labels.shape != images.shape[:1]:
            raise InputValueError(f"labels must be [{len(images)}], one per image, but are {list(labels.shape)}.")
        clean = images.detach()
        found, queries = self._run(model, clean, labels) if len(clean) else (clean, 0)
        with torch.no_grad():
            adversarial = self.threat.project(found.detach(), clean)
            success = model(adversarial).argmax(dim=1) != labels
        return AttackResult(adversarial, success, self.threat.distance(adversarial, clean), queries + 1)

    @abc.abstractmethod
    def _run(self, model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Candidate images and the model evaluations per image that they took."""
