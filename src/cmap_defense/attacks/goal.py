"""The goal of an attack, and the losses that it raises."""

from __future__ import annotations

import abc
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from cmap_defense.cmap.voting import log_mean_probability
from cmap_defense.common.options import NamedOptions
from cmap_defense.errors import AttackError


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """The predictions that an attack aims at.

    Attributes:
        labels: [B] int64, the true classes.
        targets: [B] int64, the classes to be predicted instead; None for any other class.
    """

    labels: Tensor
    targets: Tensor | None = None

    def reached(self, predictions: Tensor) -> Tensor:
        """[..., B] bool, whether predicted classes [..., B] are what the attack aims at."""
        return predictions != self.labels if self.targets is None else predictions == self.targets

    def rows(self, index: Tensor | slice) -> Goal:
        """The goal of the images at these positions in the batch."""
        return Goal(self.labels[index], None if self.targets is None else self.targets[index])

    def repeated(self, times: int) -> Goal:
        """The goal of [B times] images, each of which comes several times in a row."""
        targets = None if self.targets is None else self.targets.repeat_interleave(times)
        return Goal(self.labels.repeat_interleave(times), targets)


def margin(logits: Tensor, goal: Goal) -> Tensor:
    """The margin [M] of an attack (Carlini and Wagner 2017, arXiv 1608.04644, f6, unclipped), above 0 on success.

    Untargeted it is the largest other logit less that of the true class; targeted, the logit of the target less the
    largest other one. ``logits`` are [M, classes].
    """
    classes = goal.labels if goal.targets is None else goal.targets
    own = logits.gather(1, classes[:, None])[:, 0]
    best = logits.scatter(1, classes[:, None], -torch.inf).amax(dim=1)
    return best - own if goal.targets is None else own - best


@dataclasses.dataclass(frozen=True)
class Loss(NamedOptions, abc.ABC):
    """A number per image that an attack raises.

    Attributes:
        joint: whether it is a function of all samples together, instead of the mean over them.
    """

    joint = False

    @abc.abstractmethod
    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        """The loss [B] of each image, from logits [S, B, classes] of S evaluations with independent noise."""


def loss_of(loss: Loss, logits: Tensor, goal: Goal) -> Tensor:
    """The loss [B] of logits [S, B, classes]. Raises ``AttackError`` where a loss of a user returns something else, or
    nothing that depends on the logits for autograd."""
    found, name = loss(logits, goal), type(loss).__name__
    if not isinstance(found, Tensor) or found.shape != logits.shape[1:2]:
        came = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise AttackError(
            f"{name} must return one number for each image, [{logits.shape[1]}] here, from logits "
            f"{list(logits.shape)} of [samples, images, classes], but returned {came}."
        )
    if logits.requires_grad and torch.is_grad_enabled() and not found.requires_grad:
        raise AttackError(f"{name} does not depend on the logits for autograd: leave detach() and no_grad() out of it.")
    return found


A_LOSS = "an object: CrossEntropy(), Margin() or VoteMargin()"


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Loss):
    """The cross-entropy of the true class, or minus that of the target; mean over the samples."""

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        classes = (goal.labels if goal.targets is None else goal.targets).expand(logits.shape[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view(logits.shape[:2])
        return loss.mean(dim=0) if goal.targets is None else -loss.mean(dim=0)


@dataclasses.dataclass(frozen=True)
class Margin(Loss):
    """``margin``, mean over the samples. Unlike the cross-entropy it does not go flat at high confidence."""

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        pairs = logits.shape[:2]
        repeated = Goal(
            goal.labels.expand(pairs).flatten(), None if goal.targets is None else goal.targets.expand(pairs).flatten()
        )
        return margin(logits.flatten(0, 1), repeated).view(pairs).mean(dim=0)


@dataclasses.dataclass(frozen=True)
class VoteMargin(Loss):
    """The ``margin`` of the soft vote: of the log of the mean probability over all samples.

    It is positive where the vote is wrong. Samples that are wrong already weigh little, those near the boundary most.
    The graphs of all S samples are in memory at once.
    """

    joint = True

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        return margin(log_mean_probability(logits.transpose(0, 1)), goal)
