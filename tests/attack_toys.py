"""Toy models to attack, and every attack on images or latents at toy size."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import (
    PGD,
    SPSA,
    Attack,
    AttackResult,
    Candidates,
    ConsistencyDisruption,
    FrozenResidual,
    Goal,
    LatentAttack,
    NoiseAndDenoise,
    Overpowered,
    SeededModel,
    ShortCMAP,
    Shortened,
    TargetSteer,
    ThreatModel,
    Transfer,
    VoteMargin,
)
from cmap_defense.attacks.oracle import REEVALUATION, RESTART, Oracle
from cmap_defense.common.rng import derived_seeds, draw_latents
from cmap_defense.gradients import StraightThrough, Unrolled
from toys import LinearBackbone, ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
CLASSES = 4
WEIGHT = noise(144, CLASSES, seed=2, dtype=torch.float64)
QUICK = CMAPSettings(n_latents=2, iterations=3, learning_rate=0.1)
DOUBLE = torch.float64
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
THREATS = {"linf": ThreatModel(norm="linf", eps=0.1), "l2": ThreatModel(norm="l2", eps=1.0)}


class Linear(nn.Module):
    """A linear classifier of images of any size, pooled to 8 x 6; counts its calls."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * WEIGHT.float())
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        pooled = images
        if images.shape[2:] != SHAPE[1:]:
            pooled = nn.functional.adaptive_avg_pool2d(images, SHAPE[1:])
        return (pooled.flatten(1) - 0.5) @ self.weight


def linear(images: Tensor) -> Tensor:
    """The same as a function."""
    return (images.flatten(1) - 0.5) @ WEIGHT.to(images)


class Denoiser(ToyBackbone):
    """The toy with a ``denoise`` as well."""

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        """Images [M, C, H, W] in [-1, 1]."""
        return super().generate(noisy / (1 + sigma))


class Noisy(SeededModel):
    """A linear classifier of images with noise from seeds; it keeps the seeds and images of its calls."""

    def __init__(self, size: float = 1.0, seed: int | None = None) -> None:
        self.size, self.seed = size, seed
        self.seen: list[Tensor | None] = []
        self.images: list[Tensor] = []

    def __call__(self, images: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        self.seen.append(seeds)
        self.images.append(images.detach().clone())
        given = torch.zeros(len(images), dtype=torch.int64) if seeds is None else seeds
        drawn = draw_latents(given, 1, images.shape[1:])[:, 0].to(images)
        return linear(images + self.size * drawn * images)


class Fixed(Attack):
    """Returns given attempts [B, M, C, H, W]."""

    def __init__(self, threat: ThreatModel, attempts: Tensor, **options: Any) -> None:
        super().__init__(threat, **options)
        object.__setattr__(self, "attempts", attempts)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        return Candidates(self.attempts)


def wrapped(**options: Any) -> PurifiedClassifier:
    """A small defended classifier; options as for PurifiedClassifier."""
    classifier, backbone = options.pop("classifier", None), options.pop("backbone", None)
    return PurifiedClassifier(classifier or Linear(), backbone or Denoiser(), **({"settings": QUICK} | options))


def precise(**options: Any) -> PurifiedClassifier:
    """The same in float64."""
    return wrapped(classifier=Linear().double(), backbone=Denoiser().double(), **options)


def reachable(count: int = 3, iterations: int = 40) -> tuple[PurifiedClassifier, Tensor, Tensor]:
    """A defence whose generator reaches every image near the clean ones, which it generated, with their labels."""
    backbone = LinearBackbone(SHAPE)
    settings = CMAPSettings(n_latents=2, iterations=iterations, learning_rate=0.1, latent_weight=0.0)
    model = wrapped(backbone=backbone, settings=settings)
    with torch.no_grad():
        images = (backbone.generate(noise(count, *SHAPE, seed=6)) + 1) / 2
        return model, images, model.undefended(images).argmax(dim=1)


def labelled(count: int = 3, size: tuple[int, int] = SHAPE[1:], **options: Any) -> tuple[Tensor, Tensor]:
    """Images and the undefended classifier's predictions for them."""
    images = uniform(count, 3, *size, seed=1, **options)
    with torch.no_grad():
        return images, Linear().to(images.dtype)(images).argmax(dim=1)


MORE: dict[str, Any] = {"keep": "best", "momentum": 0.9, "schedule": "cosine", "sign_steps": True}


def suite(threat: ThreatModel, **common: Any) -> dict[str, Attack]:
    """Every attack once at least; common: restarts, seed, noise."""
    return {
        "PGD": PGD(threat, steps=2, eot=2, **common),
        "PGD all options": PGD(threat, steps=2, eot=2, loss=VoteMargin(), gradient=StraightThrough(), **MORE, **common),
        "PGD unrolled": PGD(threat, steps=1, gradient=Unrolled(), **common),
        "SPSA": SPSA(threat, steps=2, pairs=2, **common),
        "Transfer": Transfer(PGD(threat, steps=2, **common)),
        "Transfer shortened": Transfer(PGD(threat, steps=1, **common), source=Shortened(2)),
        "Transfer noise": Transfer(PGD(threat, steps=1, **common), source=NoiseAndDenoise(steps=2)),
        "LatentAttack": LatentAttack(threat, steps=3, latents=2, **common),
        "LatentAttack from noise": LatentAttack(threat, steps=3, latents=3, start="noise", **common),
        "ConsistencyDisruption": ConsistencyDisruption(threat, steps=5, **common),
        "ConsistencyDisruption released": ConsistencyDisruption(threat, steps=5, released=True, **common),
        "Overpowered": Overpowered(threat, steps=3, latents=2, **common),
        "FrozenResidual": FrozenResidual(threat, steps=3, every=2, purifications=2, memory=3, **common),
        "ShortCMAP": ShortCMAP(threat, steps=2, iterations=2, refresh=1, **common),
        "TargetSteer": TargetSteer(threat, steps=2, target=LatentAttack(threat, steps=3, latents=2), **common),
    }


NAMES = tuple(suite(ThreatModel()))
EVERY = pytest.mark.parametrize("name", NAMES)


def attempts_of(result: AttackResult) -> int:
    """Evaluations for the choice, which come before the re-evaluations: none where there is one attempt."""
    count = result.candidates.shape[1]
    return count if count > 1 else 0


def base_seeds(indices: Iterator[int] | range, seed: int) -> Tensor:
    """The seeds of images of these indices in an attack with this seed; the model's own where noise is known."""
    return derived_seeds(torch.tensor(list(indices)), seed)


def search_seeds(indices: range, seed: int, evaluation: int, restart: int = 0) -> Tensor:
    """The model's seeds in an evaluation of a search, counted from 1."""
    return derived_seeds(derived_seeds(base_seeds(indices, seed), RESTART + restart), evaluation)


def reevaluation_seeds(indices: range, seed: int, evaluation: int) -> Tensor:
    """The model's seeds in a re-evaluation, counted from 1; those of the choice come first."""
    return derived_seeds(derived_seeds(base_seeds(indices, seed), REEVALUATION), evaluation)
