"""What an evaluation was made with, as JSON: models by their settings and weights, and the software."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import numpy as np
import torch

from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.describe import describe, describe_module, describe_values, own_code, qualified_name
from cmap_defense.common.modules import device_of
from cmap_defense.purifiers import Chain, Purifier
from cmap_defense.purifiers.pair import members_of


def describe_model(model: object) -> dict[str, Any]:
    """Its class, its weights' checksum, and of a purified classifier all that decides about its predictions."""
    if not isinstance(model, PurifiedClassifier):
        return describe_module(model)
    normalisation = model.preprocessing.normalisation
    names = [getattr(getattr(member, "record", None), "name", None) for member in members_of(model.backbone)]
    labels = model.class_labels
    device = device_of(model) or torch.device("cpu")
    sample = model.purifier.sample(model.backbone, model.image_shape, device).flatten()
    return {
        "class": qualified_name(model),
        **_purifier(model),
        "vote": model.vote,
        "seed": model.seed,
        "gradient": qualified_name(model.gradient) if own_code(model.gradient) else repr(model.gradient),
        **({"gradient's options": describe(model.gradient)} if own_code(model.gradient) else {}),
        **({"step hooks": [describe(hook) for hook in model._step_hooks]} if len(model._step_hooks) else {}),
        "class_labels": labels if isinstance(labels, str) else describe(labels),
        "resize": model.preprocessing.resize,
        "normalize": None if normalisation is None else [list(normalisation.mean), list(normalisation.std)],
        "max_parallel": model.max_parallel,
        "out_of_range": model.preprocessing.out_of_range,
        "classifier": describe_module(model.classifier),
        "backbone": {
            "name": None if None in names else " and ".join(map(str, names)),
            **describe_module(model.backbone),
            "sample": describe_values(sample[:: max(1, len(sample) // 8)], digits=2),
        },
    }


def _purifier(model: PurifiedClassifier) -> dict[str, Any]:
    """The purifier's class with its settings, which of an optimisation over latents stand by themselves."""
    codes = [code for part in _parts(model.purifier) for code in own_code(part).values()]
    kind = {"class": qualified_name(model.purifier), **({"code": codes} if codes else {})}
    if model.purifier.optimises_latents:
        return {"purifier": kind, "settings": model.settings.to_dict()}
    return {"purifier": kind | model.purifier.to_dict()}


def _parts(purifier: Purifier) -> list[Purifier]:
    """A purifier, and those of a chain."""
    inner = purifier.purifiers if isinstance(purifier, Chain) else ()
    return [purifier, *(part for one in inner for part in _parts(one))]


def describe_software(device: torch.device) -> dict[str, Any]:
    """Versions and switches that may change the last bits of the results, and the kind of device."""
    found = {
        "cmap-defense": _version("cmap-defense"),
        "pyautoattack": _version("pyautoattack"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "matmul": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        cudnn = torch.backends.cudnn
        found |= {
            "deterministic": torch.are_deterministic_algorithms_enabled() or cudnn.deterministic,
            "benchmark": cudnn.benchmark,
            "tf32": [torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32],
        }
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
