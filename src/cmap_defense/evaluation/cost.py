"""What an evaluation will cost, before it starts: counted on a stand-in, timed on a short piece of the real thing.

An attack's backbone passes do not depend on what the images show, but for attacks that drop the images they have
broken. So each attack is run once against a network of no size with the same K, at two small numbers of iterations, not
below what its gradient goes back through; passes and queries at N are read off the line through the two. No formula
for any attack, so none that can be wrong, and attacks of the user's are counted in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.attacks import Attack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.errors import GradientError, MissingExtraError, SettingsError
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers.cmap import CMAP
from cmap_defense.rng import draw_latents

__all__ = ["AttackCost", "Probe", "counted_passes", "probe", "rehearse"]

SIDE = 8
"""Pixels of the stand-in's images."""

SHORT, APART = 3, 2
"""Iterations that attacks are counted at: so many at least, and so many more."""

TOGETHER = 8
"""Images of the stand-in: what is done once for a batch hardly counts then."""

PROBED = 3
"""Iterations that are timed."""


@dataclasses.dataclass(frozen=True)
class AttackCost:
    """queries: evaluations of the model per image. passes: latents through the backbone per image."""

    queries: int
    passes: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """seconds: per backbone pass, the backward pass included. bytes: the most memory that a purification took beyond
    what there was before; None where that could not be seen."""

    seconds: float
    bytes: int | None


@contextlib.contextmanager
def counted_passes(model: object) -> Iterator[list[int]]:
    """The number of latents that go through the backbone of a purified classifier in here, in a list of one; 0 for
    another model."""
    count, inside = [0], [False]
    backbone = model.backbone if isinstance(model, PurifiedClassifier) else None
    names = [name for name in ("generate", "denoise") if callable(getattr(backbone, name, None))]
    before = {name: vars(backbone)[name] for name in names if name in vars(backbone)}

    def counting(method: Any) -> Any:
        def call(first: Tensor, *rest: Any, **named: Any) -> Tensor:
            outermost, inside[0] = not inside[0], True
            try:
                count[0] += len(first) if outermost else 0
                return method(first, *rest, **named)
            finally:
                inside[0] = not outermost

        return call

    try:
        for name in names:
            setattr(backbone, name, counting(getattr(backbone, name)))
        yield count
    finally:
        for name in names:
            delattr(backbone, name)
        for name, method in before.items():
            setattr(backbone, name, method)


def rehearse(attack: Attack, model: PurifiedClassifier, classes: int) -> AttackCost | None:
    """What an attack costs per image, the choice and one judgement included; None where it does not run on a stand-in.

    It raises what the attack would raise for the model itself: MissingExtraError, SettingsError, GradientError.

    Args:
        attack: any.
        model: what it is to be run on, for its settings.
        classes: of the classifier.
    """
    if not model.purifier.optimises_latents:
        found = _counted(attack, model, classes, None)
        return None if found is None else AttackCost(found.queries, round(found.passes / TOGETHER))
    wanted_at = model.settings.iterations
    short = max([SHORT, *_gone_back(attack), *_gone_back(model.gradient)])
    counts = (short, short + APART) if wanted_at > short + APART else (wanted_at,)
    if attack.at_iterations(wanted_at) is not attack:
        counts = (wanted_at,)  # which it refuses
    costs = []
    for iterations in counts:
        wanted = attack if iterations == wanted_at else attack.at_iterations(iterations)
        found = _counted(wanted, model, classes, iterations)
        if found is None:
            return None
        costs.append(found)
    low, high = costs[0], costs[-1]
    passes = low.passes + (high.passes - low.passes) / APART * (wanted_at - counts[0])
    return AttackCost(high.queries, round(passes / TOGETHER))


def _counted(attack: Attack, model: PurifiedClassifier, classes: int, iterations: int | None) -> AttackCost | None:
    """On a stand-in for the model; None where the attack does not run on it."""
    try:
        return _count(attack, _stand_in(model, classes, iterations))
    except (MissingExtraError, SettingsError, GradientError):  # so it would go with the model itself
        raise
    except Exception:  # code of the user's may need the real thing: the cost is then unknown, and is said to be
        return None


def probe(model: PurifiedClassifier, images: Tensor) -> Probe:
    """Time and memory of a few iterations on a group of images [B, C, H, W]."""
    short = model
    if model.purifier.optimises_latents:
        short = model.variant(settings=model.settings.replace(iterations=PROBED))
    seeds = torch.arange(len(images))
    cuda = images.device.type == "cuda"
    with torch.no_grad():
        short.purify(images, seeds=seeds)
        if cuda:
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device) if cuda else 0
        begun = time.perf_counter()
        with counted_passes(short) as passes:
            short.purify(images, seeds=seeds)
        if cuda:
            torch.cuda.synchronize(images.device)
        seconds = time.perf_counter() - begun
    taken = torch.cuda.max_memory_allocated(images.device) - before if cuda else _most_memory()
    return Probe(seconds / max(1, passes[0]), taken)


def _most_memory() -> int | None:
    """The most memory that this process has held, in bytes; None on systems that do not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gone_back(part: object) -> Iterator[int]:
    """The iterations that the gradients in an attack go back through, where they do not go through all."""
    if isinstance(part, Unrolled) and part.last is not None:
        yield part.last
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield from _gone_back(getattr(part, field.name))


def _count(attack: Attack, model: PurifiedClassifier) -> AttackCost:
    """Queries per image, and the passes of all of them."""
    images = draw_latents(torch.arange(TOGETHER), 1, model.image_shape)[:, 0].sigmoid()
    with torch.no_grad():
        labels = model.undefended(images).argmax(dim=1)  # right, and stays right: nothing is dropped on the way
    with warnings.catch_warnings(), counted_passes(model) as passes:
        warnings.simplefilter("ignore")
        result = attack(model, images, labels)
    return AttackCost(result.queries, passes[0])


def _stand_in(model: PurifiedClassifier, classes: int, iterations: int | None) -> PurifiedClassifier:
    """iterations: of an optimisation over latents, None for another purifier."""
    purifier = model.purifier if iterations is None else CMAP(model.settings.replace(iterations=iterations))
    backbone = _StandInBackbone(model.image_shape[0], getattr(model.backbone, "num_classes", None))
    return PurifiedClassifier(
        _StandInClassifier(model.image_shape[0], classes),
        backbone,
        purifier=purifier,
        seed=model.seed,
        gradient=model.gradient,
    ).eval()


class _StandInBackbone(nn.Module):
    """Images of a few pixels, a smooth function of the latents."""

    def __init__(self, channels: int, num_classes: int | None) -> None:
        super().__init__()
        self.image_shape, self.num_classes = (channels, SIDE, SIDE), num_classes

    def generate(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return torch.tanh(latents)

    def denoise(self, noisy: Tensor, sigma: float, class_labels: Tensor | None = None) -> Tensor:
        return torch.tanh(noisy)


class _StandInClassifier(nn.Module):
    """Sure of the first class whatever it sees, with a gradient all the same."""

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        ramp = torch.linspace(-1, 1, channels * SIDE * SIDE * classes).view(classes, -1)
        self.register_buffer("weight", 1e-3 * torch.sin(50 * ramp))
        self.register_buffer("bias", torch.eye(classes)[0] * 5.0)

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.linear(images.flatten(1), self.weight, self.bias)
