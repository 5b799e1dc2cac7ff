"""The model as an attack sees it: predictions and gradients, with their noise and their number."""

from __future__ import annotations

import abc
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.attacks.goal import Goal, Loss, loss_of
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.classifier.cautions import warn_of_probabilities
from cmap_defense.cmap.voting import log_mean_probability
from cmap_defense.common.inputs import check_logits
from cmap_defense.common.modules import module_behind
from cmap_defense.common.rng import derived_seeds, isolated
from cmap_defense.errors import GradientError, InputValueError, SettingsError
from cmap_defense.gradients import GradientMode

Model = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] in [0, 1] to logits [B, classes]."""


class SeededModel(abc.ABC):
    """A random model whose noise can be given, as that of a purified classifier can.

    Attributes:
        seed: of all of its noise; None for fresh noise in each call without ``seeds``.
    """

    seed: int | None = None

    @abc.abstractmethod
    def __call__(self, images: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] in [0, 1].

        Args:
            images: to classify.
            seeds: [B] int64 on the CPU; None for those of ``seed``, or fresh ones.
        """


REEVALUATION, RESTART = 0x1D6E, 0x7E57A27
"""Numbers that give the re-evaluation and each restart noise of their own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Feedback:
    """Loss and gradient at images [B, C, H, W].

    Attributes:
        loss: [B].
        gradient: [B, C, H, W], of the loss.
        reached: [B] in [0, 1], the share of the evaluations that reached the attack's goal.
    """

    loss: Tensor
    gradient: Tensor
    reached: Tensor


_PASSING = (nn.Sequential, nn.DataParallel, nn.parallel.DistributedDataParallel)


def on_unit_images(model: Any) -> Any:
    """The model on images in [0, 1].

    Raises:
        SettingsError: it is none, or hands its images on to a purified classifier for normalised ones.
    """
    if not callable(model) or isinstance(model, type):
        raise SettingsError(f"A model takes images and returns logits, but this is {model!r}.")
    if isinstance(model, PurifiedClassifier):
        return model.on_unit_images()
    inside = module_behind(model)
    if isinstance(inside, PurifiedClassifier) and isinstance(model, types.MethodType):
        return getattr(inside.on_unit_images(), model.__name__)
    part = inside
    while isinstance(part, _PASSING) or hasattr(part, "_orig_mod"):  # modules that hand on images as they are
        parts = list(part.children()) if part is not None else []
        part = parts[0] if parts else None
        if isinstance(part, PurifiedClassifier) and part.preprocessing.inputs != "unit":
            raise SettingsError(
                f"In this {type(inside).__name__} is a PurifiedClassifier for normalised images, and attacks give them "
                'in [0, 1]: give the PurifiedClassifier itself, or put model.variant(inputs="unit") there.'
            )
    return model


def gradient_to(images: Tensor, loss: Tensor) -> Tensor:
    """The gradient [B, C, H, W] of a scalar loss with respect to images; 0 for an image for which it is not finite.

    Raises ``GradientError`` where the loss does not depend on the images for autograd.
    """
    return finite_rows(raw_gradient(images, loss))[0]


def raw_gradient(images: Tensor, loss: Tensor, weights: Tensor | None = None, **options: Any) -> Tensor:
    """The gradient as autograd returns it, NaN and infinite values included; ``weights`` and ``options`` are those of
    ``torch.autograd.grad``. Raises as ``gradient_to``."""
    found = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss, images, weights, allow_unused=True, **options)
    if found is None:
        raise GradientError(
            "This attack needs a gradient, but the model's logits do not depend on the images for autograd. Leave "
            "torch.no_grad() and detach() out of the model, or use SPSA or Square, which need none."
        )
    return found


def finite_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient [B, C, H, W] with 0 for images for which it is not finite, and for which it is, [B] bool."""
    finite = torch.isfinite(gradient).flatten(1).all(dim=1)
    return torch.where(finite[:, None, None, None], gradient, 0.0), finite


def wide(values: Tensor) -> Tensor:
    """Numbers [B] as [B, 1, 1, 1]."""
    return values[:, None, None, None]


def by_largest(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [B, C, H, W] divided by their largest absolute values, and these, [B]."""
    largest = gradient.abs().flatten(1).amax(dim=1)
    return gradient / wide(largest.clamp_min(torch.finfo(gradient.dtype).tiny)), largest


def unit(gradient: Tensor) -> Tensor:
    """Gradients [B, C, H, W] divided by their l2 norms, which may be tiny or huge; 0 stays 0."""
    scaled, _ = by_largest(gradient)
    return scaled / wide(scaled.flatten(1).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny))


def gradient_length(gradient: Tensor) -> Tensor:
    """The l2 norms [B] of gradients [B, C, H, W], which may be tiny or huge."""
    scaled, largest = by_largest(gradient)
    return largest * scaled.flatten(1).norm(dim=1)


@dataclasses.dataclass(eq=False)
class Oracle:
    """A model on a batch of images, with independent noise in each evaluation.

    A ``PurifiedClassifier`` or ``SeededModel`` without a seed of its own gets a seed
    per image, a function of the image's own seed and the number of the evaluation. So the outcome for an image does not
    depend on its batch. Any other model draws from torch's generators.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, classes].
        seeds: [B] int64 on the CPU, one per image.
        known: use the same noise in each evaluation, as for an attacker who knows it.
        tick: called in each evaluation.
        draws: [B] int64 on the CPU, seeds of the attack's own noise, such as a random start; by default ``seeds``.
        evaluations: [number of evaluations, number of the one that the noise belongs to], shared between oracles.
        gradient_norms: the l2 norms [B] of the gradients of ``feedback``, shared between oracles.
        finite: by gradient, for which images [B] it was finite, shared between oracles and by all restarts.
        needed: the number of classes that the labels need.
        restart: the number of the search, from 0.
    """

    model: Model
    seeds: Tensor
    _: dataclasses.KW_ONLY
    known: bool = False
    tick: Callable[[], object] = lambda: None
    draws: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, device="cpu"))
    evaluations: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    gradient_norms: list[Tensor] = dataclasses.field(default_factory=list)
    finite: list[Tensor] = dataclasses.field(default_factory=list)
    needed: int = 0
    restart: int = 0

    def __post_init__(self) -> None:
        if not len(self.draws):
            self.draws = self.seeds

    @property
    def count(self) -> int:
        """Evaluations so far, those of oracles from ``of``, ``restarted`` and ``rows`` included."""
        return self.evaluations[0]

    def __call__(self, images: Tensor, *, again: bool = False) -> Tensor:
        """Evaluate the model.

        Args:
            images: [M, C, H, W]: the batch, or fewer images for a library that drops some; these have other noise.
            again: use the noise of the previous evaluation, where the model takes seeds.

        Returns:
            Logits [M, classes].
        """
        seeds = self.next_noise(again=again)
        if len(images) != len(self.seeds):
            seeds = None
        given = images if isinstance(self.model, PurifiedClassifier) else images.clone()  # it may change it in place
        if seeds is not None and isinstance(self.model, (PurifiedClassifier, SeededModel)):
            logits = self.model(given, seeds=seeds)
        elif self.known and len(self.seeds):
            with isolated(int(self.seeds[0])):
                logits = self.model(given)
        else:
            logits = self.model(given)
        checked = self.checked(logits, len(images))
        if not isinstance(self.model, SeededModel) and not isinstance(module_behind(self.model), PurifiedClassifier):
            warn_of_probabilities(self.model, logits)
        return checked

    def checked(self, logits: Tensor, count: int) -> Tensor:
        """Logits [count, classes] of so many images, or an error that says what they are or which classes they lack."""
        logits = check_logits(logits, count)
        if logits.shape[1] < self.needed:
            raise InputValueError(
                f"Labels and targets go up to {self.needed - 1}, but the model has {logits.shape[1]} classes: "
                "number the labels as the classifier's classes."
            )
        return logits

    def next_noise(self, *, again: bool = False) -> Tensor | None:
        """Count an evaluation, with the noise of the one before where it is made ``again``.

        Returns:
            The seeds [B] of the evaluation; None where the model has a seed of its own or takes none.
        """
        self.evaluations[0] += 1
        if not again:
            self.evaluations[1] = self.evaluations[0]
        self.tick()
        return self._latest()

    def starting_noise(self) -> Tensor | None:
        """The seeds [B] that a search begins from: those of the latest evaluation; in a restart where these are always
        the same, others."""
        latest = self._latest()
        return self.draws if self.restart and (self.known or latest is None) else latest

    def _latest(self) -> Tensor | None:
        if not isinstance(self.model, (PurifiedClassifier, SeededModel)) or self.model.seed is not None:
            return None
        return self.seeds if self.known else derived_seeds(self.seeds, self.evaluations[1])

    def of(self, model: Model) -> Oracle:
        """The same noise and count with another model."""
        return dataclasses.replace(self, model=model)

    def restarted(self, restart: int) -> Oracle:
        """The same model and count with the noise of a restart; known noise stays what it is."""
        draws = derived_seeds(self.seeds, RESTART + restart)
        seeds = self.seeds if self.known else draws
        return dataclasses.replace(self, seeds=seeds, draws=draws, gradient_norms=[], restart=restart)

    def reevaluator(self) -> Oracle:
        """The same model with the noise of the re-evaluation, independent of the search unless known; own count."""
        seeds = self.seeds if self.known else derived_seeds(self.seeds, REEVALUATION)
        return dataclasses.replace(self, seeds=seeds, draws=seeds, evaluations=[0, 0], gradient_norms=[], finite=[])

    def rows(self, index: Tensor, *, separate_count: bool = False) -> Oracle:
        """The oracle for some of the images, by their positions, each with its own noise; it counts with this one, or
        from here on by itself."""
        index = index.cpu()
        counts = [*self.evaluations] if separate_count else self.evaluations
        return dataclasses.replace(
            self, seeds=self.seeds[index], draws=self.draws[index], evaluations=counts, gradient_norms=[], finite=[]
        )

    def in_mode(self, gradient: GradientMode | None, attack: object) -> Oracle:
        """The same noise and count in a gradient mode; None is the model's own. Others need a purified classifier."""
        return self if gradient is None else self.of(self.wrapper(attack).variant(hooks=True, gradient=gradient))

    def counted(self, evaluations: int) -> None:
        """Set the count, after parts of the batch were counted separately."""
        self.evaluations[:] = [evaluations, evaluations]

    def wrapper(self, attack: object, clean: Tensor | None = None) -> PurifiedClassifier:
        """The model, for an attack that needs its latents or gradient modes. Raises ``SettingsError`` for any other.

        With ``clean`` images, for an attack on the undefended classifier, the number of its classes is checked on one.
        """
        if isinstance(self.model, PurifiedClassifier):
            purifier = self.model.purifier
            if getattr(attack, "needs_latents", False) and not purifier.optimises_latents:
                raise SettingsError(
                    f"{type(attack).__name__} is an attack on latents, which {type(purifier).__name__} does not "
                    "optimise: attack a model with purifier=CMAP(), or by another attack, such as PGD."
                )
            if clean is not None:
                with torch.no_grad():
                    self.checked(self.model.undefended(clean[:1]), len(clean[:1]))
            return self.model
        raise SettingsError(
            f"{type(attack).__name__} with these settings needs the latents or the gradient modes of a "
            f"PurifiedClassifier, but the model is {type(self.model).__name__}. For images -> logits there are PGD, "
            "APGD, AutoAttack and Square without a gradient mode, and SPSA."
        )

    def gradient_to(self, images: Tensor, loss: Tensor) -> Tensor:
        """``gradient_to``, of which the oracle remembers for which images it was finite."""
        gradient, finite = finite_rows(raw_gradient(images, loss))
        self.finite.append(finite)
        return gradient

    def averaged(self, samples: int) -> Model:
        """A model that predicts the log of the mean probability over some evaluations with independent noise."""

        def model(images: Tensor) -> Tensor:
            return log_mean_probability(torch.stack([self(images) for _ in range(samples)], dim=1))

        return model

    def feedback(self, images: Tensor, goal: Goal, loss: Loss, samples: int, *, balanced: bool = False) -> Feedback:
        """Loss and gradient, averaged over evaluations with independent noise.

        This is expectation over transformation (EOT; Athalye et al. 2018, arXiv 1707.07397, section 2).

        Args:
            images: [B, C, H, W] in [0, 1].
            goal: of the images.
            loss: what the gradient is of.
            samples: evaluations.
            balanced: divide the gradient of each evaluation by its l2 norm before averaging, image by image. A joint
                loss has one gradient for all evaluations, which is left as it is.

        Raises:
            GradientError: the logits do not depend on the images for autograd.
        """
        if not isinstance(loss, Loss) or not isinstance(goal, Goal):
            raise SettingsError(
                "feedback takes a Goal, such as the one that run is given, and a loss such as CrossEntropy(), but got "
                f"{type(goal).__name__} and {type(loss).__name__}."
            )
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            groups = [samples] if loss.joint else [1] * samples
            value, gradient, reached = leaf.new_zeros(()), torch.zeros_like(leaf), leaf.new_zeros(())
            for group in groups:
                logits = torch.stack([self(leaf) for _ in range(group)])
                part = loss_of(loss, logits, goal)
                partial = self.gradient_to(leaf, part.sum())
                if balanced and not loss.joint:
                    partial = unit(partial)
                value = value + part.detach() * group / samples
                gradient = gradient + partial * (group / samples)
                reached = reached + goal.reached(logits.detach().argmax(dim=2)).float().mean(dim=0) * group / samples
        self.gradient_norms.append(gradient_length(gradient))
        return Feedback(value, gradient, reached)
