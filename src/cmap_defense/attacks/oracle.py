"""An attack's way to the model: one evaluation, one gradient, and the noise and the count of both."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.attacks.goal import Goal, Loss
from cmap_defense.cautions import warn_of_probabilities
from cmap_defense.classifier import LatentAccess, PurifiedClassifier
from cmap_defense.errors import GradientError, InputValueError, SettingsError
from cmap_defense.gradients import GradientMode
from cmap_defense.inputs import check_logits
from cmap_defense.modules import module_behind
from cmap_defense.rng import derived_seeds, isolated

__all__ = [
    "Feedback",
    "Model",
    "Oracle",
    "SeededModel",
    "by_largest",
    "differentiates_defence",
    "gradient_length",
    "gradient_to",
    "unit",
    "usable",
]

Model = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] in [0, 1] to logits [B, classes]."""


class SeededModel(abc.ABC):
    """A random model whose noise can be given, as that of a purified classifier can."""

    seed: int | None = None

    @abc.abstractmethod
    def __call__(self, images: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        """Logits [B, classes]; seeds: [B] int64 on the CPU, None for fresh ones."""


REEVALUATION, RESTART = 0x1D6E, 0x7E57A27
"""Set the noise of the judgement, and that of each restart, apart from the rest."""


@dataclasses.dataclass(frozen=True, eq=False)
class Feedback:
    """What an attack hears about images [B, C, H, W]: loss [B], its gradient [B, C, H, W], and the share of the
    evaluations that ended as the attack wants, [B]."""

    loss: Tensor
    gradient: Tensor
    reached: Tensor


def gradient_to(images: Tensor, loss: Tensor) -> Tensor:
    """The gradient of a number to images [B, C, H, W]; 0 for an image where it is not finite, so that it is left alone.

    Raises:
        GradientError: it does not depend on them for autograd.
    """
    found = torch.autograd.grad(loss, images, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise GradientError(
            "This attack needs a gradient, but the model's logits do not depend on the images for autograd."
        )
    return torch.where(torch.isfinite(found).flatten(1).all(dim=1)[:, None, None, None], found, 0.0)


def usable(tensor: Tensor) -> Tensor:
    """The tensor as one that autograd takes, also where it was made under inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def unit(gradient: Tensor) -> Tensor:
    """Gradients [B, C, H, W] divided by their l2 lengths; 0 where they are 0. Neither long nor short ones are lost."""
    scaled, _ = by_largest(gradient)
    tiny = torch.finfo(gradient.dtype).tiny
    return scaled / scaled.flatten(1).norm(dim=1).clamp_min(tiny)[:, None, None, None]


def by_largest(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [B, C, H, W] divided by their largest magnitudes, and these, [B]."""
    largest = gradient.abs().flatten(1).amax(dim=1)
    return gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)[:, None, None, None], largest


def differentiates_defence(gradient: GradientMode | None, model: Model) -> bool:
    """Whether the gradient of a model in this mode, or in its own for None, goes through its own defence."""
    if gradient is None and isinstance(model, PurifiedClassifier):
        gradient = model.gradient
    return gradient is None or gradient.differentiates_defence


def gradient_length(gradient: Tensor) -> Tensor:
    """The l2 norms [B] of gradients [B, C, H, W], however small or large these are."""
    scaled, largest = by_largest(gradient)
    return largest * scaled.flatten(1).norm(dim=1)


class Oracle:
    """Evaluates a model on a batch, each time with the next noise.

    A :class:`~cmap_defense.classifier.PurifiedClassifier` (or :class:`SeededModel`) without a seed of its own gets one
    per image and evaluation, a function of the image's own seed and the number of evaluations before: the outcome for
    an image does not depend on the batch that it is in. Any other model draws from torch's generators as it likes.

    Args:
        model: images to logits.
        seeds: [B] int64 on the CPU, one per image.
        known: the same noise at each evaluation, so that the attacker knows it.
        tick: called at each evaluation.
        draws: [B] int64 on the CPU, for what the attack itself draws, such as a random start; None for ``seeds``.
        needed: classes that the labels speak of, at least.
        evaluations: how many there were, and by which of them the noise goes, where several share a count.
        gradient_norms: l2 norms [B] of the gradients that :meth:`feedback` gave, where several share a list.
    """

    def __init__(
        self,
        model: Model,
        seeds: Tensor,
        *,
        known: bool = False,
        tick: Callable[[], None] = lambda: None,
        draws: Tensor | None = None,
        evaluations: list[int] | None = None,
        gradient_norms: list[Tensor] | None = None,
        needed: int = 0,
    ) -> None:
        self.gradient_norms = [] if gradient_norms is None else gradient_norms
        self.needed = needed
        self.draws = seeds if draws is None else draws
        self.model, self.seeds, self.known, self.tick = model, seeds, known, tick
        self._evaluations = [0, 0] if evaluations is None else evaluations

    @property
    def count(self) -> int:
        """Evaluations so far, of this model and of those that :meth:`of` and :meth:`restarted` gave."""
        return self._evaluations[0]

    def __call__(self, images: Tensor, *, again: bool = False) -> Tensor:
        """Logits [M, classes] of images [M, C, H, W]: the batch, or a part of it for a library that drops images.

        again: with the noise of the evaluation before, where the model takes seeds.
        """
        seeds = self.next_noise(again=again)
        if len(images) != len(self.seeds):
            seeds = None
        if seeds is not None and isinstance(self.model, (PurifiedClassifier, SeededModel)):
            logits = self.model(images, seeds=seeds)
        elif self.known and len(self.seeds):
            with isolated(int(self.seeds[0])):
                logits = self.model(images)
        else:
            logits = self.model(images)
        checked = self.checked(logits, len(images))
        if not isinstance(self.model, SeededModel) and not isinstance(module_behind(self.model), LatentAccess):
            warn_of_probabilities(self.model, logits)
        return checked

    def check_classes(self, wrapper: PurifiedClassifier, clean: Tensor) -> None:
        """As :meth:`checked`, for attacks that ask the bare classifier: it is asked about one image."""
        with torch.no_grad():
            self.checked(wrapper.undefended(clean[:1]), len(clean[:1]))

    def checked(self, logits: Tensor, count: int) -> Tensor:
        """Logits [count, classes] that are numbers, of as many classes as the labels speak of.

        Raises:
            ClassifierError: they are not logits.
            InputValueError: there are labels for which they have no class.
        """
        logits = check_logits(logits, count)
        if logits.shape[1] < self.needed:
            raise InputValueError(
                f"Labels and targets go up to {self.needed - 1}, but the model has {logits.shape[1]} classes."
            )
        return logits

    def next_noise(self, *, again: bool = False) -> Tensor | None:
        """Count an evaluation, and the seeds [B] for it; None where the model has a seed of its own, or takes none."""
        self._evaluations[0] += 1
        if not again:
            self._evaluations[1] = self._evaluations[0]
        self.tick()
        return self.own_seeds()

    def own_seeds(self) -> Tensor | None:
        """The seeds of the latest evaluation."""
        if not isinstance(self.model, (PurifiedClassifier, SeededModel)) or self.model.seed is not None:
            return None
        return self.seeds if self.known else derived_seeds(self.seeds, self._evaluations[1])

    def of(self, model: Model) -> Oracle:
        """The same noise and images, another model."""
        return self._like(model, self.seeds, self.draws, self._evaluations, self.gradient_norms)

    def restarted(self, restart: int) -> Oracle:
        """Other noise for another restart; the model's stays what it is where it is known."""
        draws = derived_seeds(self.seeds, RESTART + restart)
        seeds = self.seeds if self.known else draws
        return self._like(self.model, seeds, draws, self._evaluations)

    def reevaluator(self) -> Oracle:
        """The same model with noise that the search has not seen, unless noise is known; it counts for itself."""
        seeds = self.seeds if self.known else derived_seeds(self.seeds, REEVALUATION)
        return self._like(self.model, seeds, seeds, [0, 0])

    def rows(self, index: Tensor, *, separate_count: bool = False) -> Oracle:
        """The oracle for some of the images, each with its own noise.

        Args:
            index: positions of the images in the batch.
            separate_count: give it a count of evaluations of its own, instead of this oracle's.
        """
        index = index.cpu()
        return self._like(
            self.model,
            self.seeds[index],
            self.draws[index],
            [*self._evaluations] if separate_count else self._evaluations,
        )

    def in_mode(self, gradient: GradientMode | None, attack: object) -> Oracle:
        """The same wrapper with another gradient mode; as it is for None. Raises as :meth:`wrapper`."""
        return self if gradient is None else self.of(self.wrapper(attack).variant(hooks=True, gradient=gradient))

    def counted(self, evaluations: int) -> None:
        """Set the count, where parts of the batch counted for themselves."""
        self._evaluations[:] = [evaluations, evaluations]

    def _like(
        self,
        model: Model,
        seeds: Tensor,
        draws: Tensor,
        evaluations: list[int],
        gradient_norms: list[Tensor] | None = None,
    ) -> Oracle:
        return Oracle(
            model,
            seeds,
            known=self.known,
            tick=self.tick,
            draws=draws,
            evaluations=evaluations,
            gradient_norms=gradient_norms,
            needed=self.needed,
        )

    def wrapper(self, attack: object) -> PurifiedClassifier:
        """The model as what it must be for an attack on latents. Raises :class:`SettingsError` for another."""
        if isinstance(self.model, PurifiedClassifier):
            return self.model
        raise SettingsError(
            f"{type(attack).__name__} with these settings needs the latents or the gradient modes of a "
            f"PurifiedClassifier, but the model is {type(self.model).__name__}. For images -> logits there are PGD, "
            "APGD, AutoAttack and Square without a gradient mode, and SPSA."
        )

    def averaged(self, samples: int) -> Model:
        """The log of the mean probability over some evaluations, as a model of its own (EOT of the answer)."""

        def model(images: Tensor) -> Tensor:
            answers = torch.stack([self(images).log_softmax(dim=1) for _ in range(samples)])
            return answers.logsumexp(dim=0) - math.log(samples)

        return model

    def feedback(self, images: Tensor, goal: Goal, loss: Loss, samples: int, *, balanced: bool = False) -> Feedback:
        """Loss and gradient, averaged over the noise of some evaluations (EOT; Athalye et al. 2018, arXiv 1707.07397).

        balanced: divide the gradient of each evaluation by its length first, image by image. A joint loss has one
        gradient for all its evaluations; nothing is divided there.

        Raises:
            GradientError: the logits do not depend on the images for autograd.
        """
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            groups = [samples] if loss.joint else [1] * samples
            value, gradient, reached = torch.zeros(()), torch.zeros_like(leaf), torch.zeros(())
            for group in groups:
                logits = torch.stack([self(leaf) for _ in range(group)])
                part = loss(logits, goal)
                partial = gradient_to(leaf, part.sum())
                if balanced and not loss.joint:
                    partial = unit(partial)
                value = value + part.detach() * group / samples
                gradient = gradient + partial * (group / samples)
                reached = reached + goal.reached(logits.detach().argmax(dim=2)).float().mean(dim=0) * group / samples
        self.gradient_norms.append(gradient_length(gradient))
        return Feedback(value, gradient, reached)
