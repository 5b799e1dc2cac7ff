"""Warnings about a classifier that is accepted but probably not used as meant, once for each classifier."""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.common.describe import named_weights
from cmap_defense.common.files import tensor_checksum
from cmap_defense.common.modules import module_behind, weights_of
from cmap_defense.errors import ClassifierWarning
from cmap_defense.purifiers.base import Purifier

_WARNED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
"""What was said about which classifier."""


def warn_of_training_mode(classifier: object, images: Tensor) -> None:
    """Warn of a classifier in training mode that is called where nothing can be trained: gradients are off, or neither
    the images nor a weight requires one. Only modules count whose code reads the mode, as BatchNorm and Dropout do.
    """
    module = module_behind(classifier)
    if module is None or torch.compiler.is_compiling() or "training" in _said(module):
        return
    wanted = images.requires_grad or any(weight.requires_grad for weight in weights_of(module))
    if wanted and torch.is_grad_enabled():
        return
    found = part_in_training_mode(module)
    if found is not None:
        _warn(
            module,
            "training",
            f"The classifier is in training mode ({type(found).__name__}), so that its predictions may be random or "
            "depend on the batch, and its running statistics may change with each call. Call model.eval() first.",
        )


def part_in_training_mode(classifier: object) -> nn.Module | None:
    """The first part of a classifier that is in training mode and reads it, as BatchNorm and Dropout do; or None."""
    module = module_behind(classifier)
    parts = () if module is None else module.modules()
    return next((part for part in parts if part.training and _depends_on_mode(part)), None)


def warn_of_probabilities(classifier: object, outputs: Tensor) -> None:
    """Warn where all outputs [M, classes] of a classifier lie in [0, 1] and each row sums to 1, within rounding."""
    if not len(outputs) or torch.compiler.is_compiling() or "probabilities" in _said(classifier):
        return
    rounding = max(1e-5, 4 * torch.finfo(outputs.dtype).eps)
    values = outputs.detach().float()
    outside = (values.amin() < -rounding) | ((values.sum(dim=1) - 1).abs() > rounding).any()
    if not bool(outside):
        _warn(
            classifier,
            "probabilities",
            "The classifier's outputs lie in [0, 1] and sum to 1 for each image, as probabilities do, but logits are "
            "expected: a softmax of probabilities is nearly uniform, and so are its gradients. Pass the classifier "
            "without its softmax (of an nn.Sequential: classifier[:-1]), or the logarithm of its outputs: "
            "lambda images: classifier(images).clamp_min(1e-30).log().",
        )


def adapted_to(backbone: nn.Module, purifier: Purifier) -> dict[str, Any]:
    """What a classifier behind them is adapted to: the purifier without its number of versions, and the checksum of the
    backbone's weights, None where it is not known."""
    return {
        "purifier": {"class": type(purifier).__name__, **_without(purifier.to_dict(), "n_latents")},
        "backbone": _checksum(purifier.member(backbone)),
    }


def warn_of_another_adaptation(classifier: object, backbone: nn.Module, purifier: Purifier) -> None:
    """Warn of a classifier that ``cmap_defense.adapt`` has adapted to another purifier or backbone."""
    known = getattr(module_behind(classifier), "adapted_to", None)
    alone = isinstance(known, dict) and known.get("purifier") == {"class": "Identity"}
    if not isinstance(known, dict) or alone or purifier.passes == 0 or "adaptation" in _said(classifier):
        return
    here = adapted_to(backbone, purifier)
    other = [name for name in here if known.get(name) != here[name] and None not in (known.get(name), here[name])]
    if other:
        there, now = (", ".join(_target(name, record.get(name)) for name in other) for record in (known, here))
        _warn(
            classifier,
            "adaptation",
            f"The classifier was adapted to another {' and '.join(other)}: to {there}, and is behind {now}. "
            "Wrap it with what it was adapted to, or adapt it again.",
        )


def _checksum(backbone: nn.Module) -> str | None:
    """The checksum of the weights in bfloat16, which is the same for a backbone in float32, in float64 and in bfloat16.

    None where a weight is in float16 or less, from which the one in bfloat16 cannot be computed.
    """
    weights = named_weights(backbone)
    floats = {weight.dtype for _, weight in weights if weight.is_floating_point()}
    if not floats <= {torch.bfloat16, torch.float32, torch.float64}:
        return None
    return tensor_checksum((name, w.float().bfloat16() if w.is_floating_point() else w) for name, w in weights)


def _target(name: str, value: object) -> str:
    return f"a backbone with weights {str(value)[:12]}" if name == "backbone" else str(value)


def _without(value: Any, key: str) -> Any:
    """JSON without the entries of this key, at any depth."""
    if isinstance(value, dict):
        return {name: _without(part, key) for name, part in value.items() if name != key}
    return [_without(part, key) for part in value] if isinstance(value, list) else value


def _said(classifier: object) -> set[str]:
    """What was said about a classifier; of one that has no identity of its own, about its type."""
    module = module_behind(classifier)
    key = classifier if module is None else module
    if getattr(key, "_is_replica", False):  # nn.DataParallel makes them anew for each call
        key = type(key)
    try:
        return _WARNED.setdefault(key, set())
    except TypeError:  # no weak reference, or no hash
        return _WARNED.setdefault(type(key), set())


def _warn(classifier: object, topic: str, text: str) -> None:
    """Warn at the line outside of this package and of torch that led here."""
    _said(classifier).add(topic)
    warnings.warn(text, ClassifierWarning, stacklevel=level_of_caller())


def level_of_caller() -> int:
    """The ``stacklevel`` at which a warning names the code that called this package or torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("cmap_defense", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a method of a module's class reads ``training``, as those of BatchNorm and Dropout do; those of this
    package only hand it on."""
    if type(module).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return True
    lineage = type(module).__mro__
    for base in lineage[: lineage.index(nn.Module)]:
        for name, method in vars(base).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if inspect.isfunction(method) else None
            if code is not None and not (name.startswith("__") or name == "train") and "training" in code.co_names:
                return True
    return False
