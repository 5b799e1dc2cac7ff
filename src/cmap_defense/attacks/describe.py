"""Attacks and their settings as JSON values."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmap_defense.modules import dtype_of
from cmap_defense.options import NamedOptions

__all__ = ["checksum", "described"]

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def described(value: Any) -> Any:
    """A setting as a JSON value.

    Args:
        value: a dataclass or another object with options becomes its class, and these by name; a network its
            class, layers, checksum of weights and precision; a sequence a list; a function its qualified name. Numbers,
            texts and None stay what they are. Anything else becomes its repr without addresses in memory.
    """
    if isinstance(value, nn.Module):
        return _network(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, NamedOptions):
        return {"class": type(value).__name__, **_options(value)}
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return f"{value.__module__}.{name}"
    return ADDRESS.sub("", repr(value))


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and contents.

    Args:
        tensors: by name; their order counts.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(np.ascontiguousarray(whole.reshape(-1).view(torch.uint8).numpy()).data if whole.numel() else b"")
    return digest.hexdigest()


def _options(value: NamedOptions) -> dict[str, Any]:
    """The constructor's options, which are attributes of the object or of a dataclass among these."""
    attributes = dict(vars(value))
    for part in vars(value).values():
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            attributes = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)} | attributes
    names = inspect.signature(type(value).__init__).parameters
    return {name: described(attributes[name]) for name in names if name in attributes}


def _network(module: nn.Module) -> dict[str, Any]:
    """Class, layers, weights and precision; operations between the layers do not show."""
    saved = module.state_dict()
    unsaved = [(name, buffer) for name, buffer in module.named_buffers() if name not in saved]
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "network": hashlib.sha256(ADDRESS.sub("", repr(module)).encode()).hexdigest(),
        "weights": checksum([*saved.items(), *unsaved]),
        "precision": str(dtype_of(module)),
    }
