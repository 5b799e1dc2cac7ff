"""What an evaluation was made of, as JSON: models by their weights, data by their pixels, attacks by their settings."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import platform
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmap_defense.attacks import Attack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.modules import dtype_of
from cmap_defense.purifiers.cmap import CMAP

__all__ = [
    "attack_settings",
    "checksum",
    "describe_answer",
    "describe_attack",
    "describe_model",
    "describe_software",
]

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and contents, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(np.ascontiguousarray(whole.reshape(-1).view(torch.uint8).numpy()).data if whole.numel() else b"")
    return digest.hexdigest()


def describe_model(model: object) -> dict[str, Any]:
    """Its class, its weights' checksum, and of a purified classifier all that decides about its answers."""
    if not isinstance(model, PurifiedClassifier):
        return _module(model)
    normalisation = model.preprocessing.normalisation
    record = getattr(model.backbone, "record", None)
    labels = model.class_labels
    return {
        "class": _name(model),
        **_purifier(model),
        "vote": model.vote,
        "seed": model.seed,
        "gradient": repr(model.gradient),
        "class_labels": labels if isinstance(labels, str) else _name(labels),
        "resize": model.preprocessing.resize,
        "normalize": None if normalisation is None else [list(normalisation.mean), list(normalisation.std)],
        "max_parallel": model.max_parallel,
        "out_of_range": model.preprocessing.out_of_range,
        "classifier": _module(model.classifier),
        "backbone": {"name": None if record is None else record.name, **_module(model.backbone)},
    }


def _purifier(model: PurifiedClassifier) -> dict[str, Any]:
    """The settings of CMAP, or the purifier with its own."""
    if isinstance(model.purifier, CMAP):
        return {"settings": model.settings.to_dict()}
    found = _plain(model.purifier)
    return {"purifier": found if isinstance(found, dict) else {"class": _name(model.purifier), "described": found}}


def describe_attack(attack: Attack) -> str:
    """Its settings in full, and checksums of the networks in them, where there are any.

    Addresses in memory, of a function of the user's, are left out.
    """
    networks = [f"{where}: weights {checksum(_weights(found))}" for where, found in _networks(attack, "")]
    return "; ".join([_without_addresses(repr(attack)), *networks])


def describe_software(device: torch.device) -> dict[str, Any]:
    """Versions and switches that bits may hang on, and the kind of device."""
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


def describe_answer(logits: Tensor) -> list[float]:
    """Logits [B, classes] to one image, rounded: what a description of classes and weights does not see (functions,
    constants that are plain attributes) shows in what comes out."""
    return [float(f"{value:.4g}") for value in logits[0].double().tolist()]


def attack_settings(attack: Attack) -> dict[str, Any]:
    """Its settings by name, as JSON, to be compared with those of another: settings of its parts inside it, networks by
    class and checksum."""
    found = _plain(attack)
    return found if isinstance(found, dict) else {"class": _name(attack), "described": found}


def _plain(part: object) -> Any:
    if isinstance(part, nn.Module):
        return _module(part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {field.name: _plain(getattr(part, field.name)) for field in dataclasses.fields(part)}
        return {"class": type(part).__name__, **fields}
    if isinstance(part, (list, tuple)):
        return [_plain(value) for value in part]
    if part is None or isinstance(part, (bool, int, str)) or (isinstance(part, float) and math.isfinite(part)):
        return part
    return _without_addresses(repr(part))


def _module(module: object) -> dict[str, Any]:
    """Class, layers, weights and precision. What is done between the layers, and other attributes, do not show."""
    if not isinstance(module, nn.Module):
        return {"class": _name(module), "network": None, "weights": checksum(()), "precision": str(dtype_of(module))}
    layers = hashlib.sha256(_without_addresses(repr(module)).encode()).hexdigest()
    return {
        "class": _name(module),
        "network": layers,
        "weights": checksum(_weights(module)),
        "precision": str(dtype_of(module)),
    }


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, those too that are not saved with the rest, as a model's own normalisation often is."""
    saved = module.state_dict()
    return [*saved.items(), *((name, buffer) for name, buffer in module.named_buffers() if name not in saved)]


def _networks(part: object, where: str) -> Iterator[tuple[str, nn.Module]]:
    """The networks in an attack's settings, by the names of the settings."""
    if isinstance(part, nn.Module):
        yield where, part
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield from _networks(getattr(part, field.name), f"{where}.{field.name}".lstrip("."))


def _without_addresses(text: str) -> str:
    return ADDRESS.sub("", text)


def _name(thing: object) -> str:
    """Module and qualified name, of a function or of an object's class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"  # pyright: ignore[reportAttributeAccessIssue]
