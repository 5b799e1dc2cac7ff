"""Attacks that search another model, and are re-evaluated on this one."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates, check_candidates, missing_for
from cmap_defense.attacks.goal import Goal
from cmap_defense.attacks.oracle import Model, Oracle, SeededModel, on_unit_images
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import evaluating
from cmap_defense.common.options import NamedOptions
from cmap_defense.common.rng import draw_latents, fresh_seeds
from cmap_defense.common.settings import check_fields, setting
from cmap_defense.errors import GradientError, SettingsError
from cmap_defense.gradients.surrogate import SIGMA_MIN, surrogate_images
from cmap_defense.threat import ThreatModel


class Source(NamedOptions, abc.ABC):
    """A model to attack in place of a purified classifier, made from its parts.

    Attributes:
        has_defence: whether the defence is part of it.
        needs_latents: whether it is made of a purifier that optimises latents.
        needs_denoise: whether it needs a backbone with ``denoise``.
    """

    has_defence = False
    needs_latents = False
    needs_denoise = False

    def __post_init__(self) -> None:
        """Check the fields that ``setting`` made, of a source that is a dataclass."""
        check_fields(self)

    @abc.abstractmethod
    def of(self, wrapper: PurifiedClassifier) -> Model:
        """The model, images [B, C, H, W] in [0, 1] to logits [B, classes], made from a purified classifier."""


@dataclasses.dataclass(frozen=True)
class Undefended(Source):
    """The classifier without its defence."""

    def of(self, wrapper: PurifiedClassifier) -> Model:
        return wrapper.undefended


@dataclasses.dataclass(frozen=True)
class Shortened(Source):
    """The same defence with another number of iterations.

    Args:
        iterations: of the latent loop.

    Raises:
        SettingsError: it is less than 1.
    """

    has_defence = True
    needs_latents = True
    iterations: int = setting(10, minimum=1)

    def of(self, wrapper: PurifiedClassifier) -> Model:
        return wrapper.variant(hooks=True, settings=wrapper.settings.replace(iterations=self.iterations))


@dataclasses.dataclass(frozen=True)
class NoiseAndDenoise(Source):
    """C(clip(f(x' + sigma e, sigma))), the surrogate that the CMAP paper attacks; it has no latent optimisation.

    It is the surrogate process of Lee and Kim 2023 (arXiv 2303.09051) with a consistency function f. Its noise is fresh
    in each evaluation, also where the defence has a fixed seed.

    Args:
        sigma: noise level in units of images in [-1, 1]; 0.1395 is level 5 of an 18-level Karras schedule with rho 7.
        steps: consistency steps.
        straight_through: take the identity as the gradient of the denoising (BPDA).

    Raises:
        SettingsError: a value is out of its range.
    """

    needs_denoise = True

    sigma: float = setting(0.1395, minimum=SIGMA_MIN)
    steps: int = setting(1, minimum=1)
    straight_through: bool = setting(False)

    def of(self, wrapper: PurifiedClassifier) -> Model:
        if wrapper.denoiser() is None:
            raise GradientError(
                f"{self!r} needs a backbone with denoise(noisy, sigma), which this one lacks. "
                "Give such a backbone, or attack another source, such as Undefended()."
            )
        return _NoisedAndDenoised(wrapper, self)


class _NoisedAndDenoised(SeededModel):
    def __init__(self, wrapper: PurifiedClassifier, source: NoiseAndDenoise) -> None:
        self.wrapper, self.source = wrapper, source

    def __call__(self, images: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        wrapper = self.wrapper
        seeds = fresh_seeds(len(images)) if seeds is None else seeds
        small = wrapper.preprocessing.resized(images, wrapper.image_shape[1:])
        noise = draw_latents(seeds, self.source.steps, small.shape[1:])[:, None].to(small)
        labels = wrapper.latent_class_labels(images)
        denoise = wrapper.denoiser(None if labels is None else labels[:, :1], recompute=True)
        assert denoise is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.source.straight_through):
            denoised = surrogate_images(denoise, small, noise, self.source.sigma)[:, 0]
        if self.source.straight_through:
            denoised = denoised + (small - small.detach())
        return wrapper.undefended(wrapper.preprocessing.resized(denoised, images.shape[2:]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """A transfer attack (Papernot et al. 2016, arXiv 1605.07277): the search is on another model.

    Args:
        attack: the attack, which also sets threat model, restarts, seed and noise.
        source: the model that it searches: ``Undefended()``, ``Shortened(iterations)``,
            ``NoiseAndDenoise(sigma, steps)``, or any function from images in [0, 1] to logits.

    Raises:
        SettingsError: an argument is something else.
    """

    threat: ThreatModel = dataclasses.field(init=False)
    attack: Attack = dataclasses.field(kw_only=False)
    source: Source | Callable[[Tensor], Tensor] = Undefended()
    restarts: int = dataclasses.field(init=False)
    seed: int = dataclasses.field(init=False)
    noise: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise SettingsError(f"Transfer.attack must be an attack such as PGD(...), but is {self.attack!r}.")
        if isinstance(self.source, type) or not (callable(self.source) or isinstance(self.source, Source)):
            raise SettingsError(f"Transfer.source must be an object such as Undefended(), but is {self.source!r}.")
        for name in ("threat", "restarts", "seed", "noise"):
            object.__setattr__(self, name, getattr(self.attack, name))
        super().__post_init__()

    def under(self, threat: ThreatModel) -> Transfer:
        return dataclasses.replace(self, attack=self.attack.under(threat))

    def passes_per_image(self, model: PurifiedClassifier) -> int | None:
        return None if self.evaluates_defence() or isinstance(self.source, NoiseAndDenoise) else 0

    def check_installed(self) -> None:
        self.attack.check_installed()

    def missing(self, model: Model) -> str | None:
        if not isinstance(self.source, Source):
            return self.attack.missing(self.source)
        lacking = missing_for(self.source, model)
        return lacking or self.attack.missing(self.source.of(model))  # pyright: ignore[reportArgumentType]

    def evaluates_defence(self) -> bool:
        return isinstance(self.source, Source) and self.source.has_defence

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        source = self.source.of(oracle.wrapper(self)) if isinstance(self.source, Source) else self.source
        source = on_unit_images(source)
        with evaluating(source):
            return check_candidates(self.attack.run(oracle.of(source), clean, goal), clean, self.attack)
