"""How fast a defended classifier is on this machine, and whether it takes the images of a data set."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import torch
from torch import Tensor

from cmap_defense.classifier.wrapper import PurifiedClassifier
from cmap_defense.common.passes import counting_passes
from cmap_defense.errors import ClassifierError, CmapError

TIMED = 3
"""Iterations that are timed."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a short purification took.

    Attributes:
        seconds: per network pass, the backward pass included.
        bytes: largest memory of the purification beyond what was in use before; None where that is not known.
    """

    seconds: float
    bytes: int | None


def measure_speed(model: PurifiedClassifier, images: Tensor) -> Speed:
    """Time and memory of a purification of few iterations of images [B, C, H, W] on the model's device, together."""
    short = model
    if model.purifier.optimises_latents:
        short = model.variant(settings=model.settings.replace(iterations=TIMED))
    seeds = torch.arange(len(images), device="cpu")
    cuda = images.device.type == "cuda"
    with torch.no_grad():
        short.purify(images, seeds=seeds)
        if cuda:
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device) if cuda else 0
        begun = time.perf_counter()
        with counting_passes() as passes:
            short.purify(images, seeds=seeds)
        if cuda:
            torch.cuda.synchronize(images.device)
        seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated(images.device) - before if cuda else _peak_memory()
    return Speed(seconds / max(1, passes.total), peak)


def undefended_logits(model: Any, image: Tensor, name: str) -> Any:
    """The outputs of a model, without its defence, for one image [1, C, H, W] in [0, 1] on the model's device.

    Raises:
        ClassifierError: the classifier's own code raised, for instance since it expects other channels or another size;
            it is called ``name`` there.
    """
    try:
        return model.undefended(image) if isinstance(model, PurifiedClassifier) else model(image)
    except (CmapError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise ClassifierError(
            f"The classifier of {name!r} raised {type(error).__name__} for an image {list(image.shape)} of the data "
            f"set: {error}. Give a classifier for images of these channels and this size, or convert them at the "
            "beginning of its forward, such as with images.expand(-1, 3, -1, -1) for three channels."
        ) from error


def _peak_memory() -> int | None:
    """The most memory that this process has held, in bytes; None on systems that do not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
