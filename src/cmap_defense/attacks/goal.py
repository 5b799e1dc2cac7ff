"""What an attack wants, and the losses that it climbs."""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cmap_defense.options import NamedOptions

__all__ = ["CrossEntropy", "Goal", "Loss", "Margin", "VoteMargin", "margin"]


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """labels: [B] int64, the true classes. targets: [B], the classes wanted instead; None for any other class."""

    labels: Tensor
    targets: Tensor | None = None

    def reached(self, predictions: Tensor) -> Tensor:
        """[..., B] bool for predicted classes [..., B]."""
        return predictions != self.labels if self.targets is None else predictions == self.targets

    def rows(self, index: Tensor | slice) -> Goal:
        """The goal of some of the images."""
        return Goal(self.labels[index], None if self.targets is None else self.targets[index])

    def repeated(self, times: int) -> Goal:
        """Each image's goal ``times`` times in a row, [B times]."""
        targets = None if self.targets is None else self.targets.repeat_interleave(times)
        return Goal(self.labels.repeat_interleave(times), targets)


def margin(logits: Tensor, goal: Goal) -> Tensor:
    """[M], from logits [M, classes]: how far the attack has come, above 0 when it has succeeded.

    Untargeted: the best other logit less the true one's. Targeted: the target's less the best other one.
    """
    classes = goal.labels if goal.targets is None else goal.targets
    own = logits.gather(1, classes[:, None])[:, 0]
    best = logits.scatter(1, classes[:, None], -torch.inf).amax(dim=1)
    return best - own if goal.targets is None else own - best


@dataclasses.dataclass(frozen=True)
class Loss(NamedOptions, abc.ABC):
    """A number per image that an attack raises.

    joint: whether it is a function of all samples together, instead of the mean of a function of each.
    """

    joint = False

    @abc.abstractmethod
    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        """[B] from logits [S, B, classes] of S evaluations with noise of their own."""


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Loss):
    """Of the true class; targeted: minus that of the target. Mean over the samples."""

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        classes = (goal.labels if goal.targets is None else goal.targets).expand(logits.shape[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view(logits.shape[:2])
        return loss.mean(dim=0) if goal.targets is None else -loss.mean(dim=0)


@dataclasses.dataclass(frozen=True)
class Margin(Loss):
    """:func:`margin` of each sample (Carlini and Wagner 2017, arXiv 1608.04644, f6, unclipped). Mean over the samples.

    Unlike the cross-entropy it does not go flat where the classifier is sure.
    """

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        pairs = logits.shape[:2]
        repeated = Goal(
            goal.labels.expand(pairs).flatten(), None if goal.targets is None else goal.targets.expand(pairs).flatten()
        )
        return margin(logits.flatten(0, 1), repeated).view(pairs).mean(dim=0)


@dataclasses.dataclass(frozen=True)
class VoteMargin(Loss):
    """The margin of the soft vote of all samples: the log of the mean probability over them.

    What a defence that votes has to lose, in one number. A sample that is lost already no longer counts for much, one
    that is about to turn does. All S graphs are in memory at once.
    """

    joint = True

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        vote = logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))
        return margin(vote, goal)
