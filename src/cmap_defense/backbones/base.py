"""The backbone protocol: what purifiers need of a generative model, and nothing else."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cmap_defense.backbones.record import KINDS
from cmap_defense.common.modules import dtype_of
from cmap_defense.common.passes import count_passes
from cmap_defense.errors import BackboneError

_METHODS = {
    "generate": "generate(latents) -> images in [-1, 1]",
    "denoise": "denoise(noisy, sigma) -> images in [-1, 1]",
}


@runtime_checkable
class Backbone(Protocol):
    """Any ``nn.Module`` with these; see "Write your own backbone" in the documentation.

    A denoiser has ``denoise(noisy, sigma)`` in place of ``generate``; a consistency model may have both. A module may
    say by ``kind = "consistency"`` or ``kind = "denoiser"`` which of them it is, see ``kind_of``. A
    class-conditional one has ``num_classes`` besides, and its methods take [B] labels as last argument.

    Attributes:
        image_shape: (C, H, W) of its images and latents.
    """

    image_shape: tuple[int, int, int]

    def generate(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] from unit latents [B, C, H, W], differentiably."""
        ...


def kind_of(backbone: object) -> str:
    """ "consistency" or "denoiser": what the module says by ``kind``, else the first for one that has ``generate``.

    Raises:
        BackboneError: ``kind`` is something else.
    """
    kind = getattr(backbone, "kind", None) or KINDS[not callable(getattr(backbone, "generate", None))]
    if kind not in KINDS:
        raise BackboneError(f'kind must be "consistency" or "denoiser", but {type(backbone).__name__} has {kind!r}.')
    return kind


def check_backbone(backbone: object, needs: str | None = "generate") -> nn.Module:
    """``backbone`` when it satisfies the protocol.

    Args:
        backbone: a module.
        needs: the method that it is used by: "generate" or "denoise"; None for neither.

    Raises:
        BackboneError: something is missing; the message says what.
    """
    name = type(backbone).__name__
    if not isinstance(backbone, nn.Module):
        raise BackboneError(
            "A backbone is a registry name, a Hub id, a folder, or an nn.Module with image_shape and generate, "
            f"but got {name}."
        )
    _refuse_wrapped(backbone)
    shape = getattr(backbone, "image_shape", None)
    if not isinstance(shape, (tuple, list)) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise BackboneError(
            f"A backbone has image_shape = (C, H, W), three positive integers, but {name} has {shape!r}."
        )
    usable = {method for method in _METHODS if callable(getattr(backbone, method, None))}
    if kind_of(backbone) == "denoiser":
        usable.discard("generate")
    if needs is not None and needs not in usable:
        hint = " A denoiser has no one-step generator: CMAP needs a consistency model." if "denoise" in usable else ""
        hint = " A purifier that adds noise and denoises needs it." if "generate" in usable else hint
        raise BackboneError(f"A backbone has {_METHODS[needs]}, but {name} has no such method.{hint}")
    classes = getattr(backbone, "num_classes", None)
    if classes is not None and (type(classes) is not int or classes < 1):
        raise BackboneError(f"num_classes must be a positive integer or None, but {name} has {classes!r}.")
    if needs is not None:
        _check_call(backbone, needs, conditional=classes is not None)
    if any(p.is_inference() for p in backbone.parameters()):
        raise BackboneError(
            f"{name}'s weights were made under torch.inference_mode, which bars gradients: load it outside."
        )
    return backbone


def _check_call(backbone: nn.Module, method: str, *, conditional: bool) -> None:
    """Raise ``BackboneError`` where a method does not take what it is called with."""
    given = ["latents"] if method == "generate" else ["noisy", "sigma"]
    given += ["class_labels"] if conditional else []
    with contextlib.suppress(ValueError):  # code without a signature
        try:
            inspect.signature(getattr(backbone, method), follow_wrapped=False).bind(*given)
        except TypeError as error:
            raise BackboneError(
                f"{type(backbone).__name__} must have {method}({', '.join(given)}), but its own is another: {error}."
                + (" It has num_classes, as a class-conditional backbone does." if conditional else "")
            ) from error


def _refuse_wrapped(backbone: nn.Module) -> None:
    """Wrappers of ``forward`` have no effect on ``generate``. Raises ``BackboneError`` with what has one."""
    inner = getattr(backbone, "_orig_mod", None)  # of torch.compile
    if inner is not None or getattr(backbone, "_compiled_call_impl", None) is not None:
        has_network = isinstance(getattr(backbone, "network", None), nn.Module)
        way = "backbone.network.compile()" if has_network else "backbone.generate = torch.compile(backbone.generate)"
        raise BackboneError(
            "The backbone was compiled as a whole, which compiles its forward, but only its generate is called. "
            f"Compile what runs there, before the backbone is passed on: {way}."
        )
    if isinstance(backbone, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise BackboneError(
            f"{type(backbone).__name__}(backbone) distributes forward, but only generate is called. Distribute the "
            "whole: nn.DataParallel(PurifiedClassifier(classifier, backbone))."
        )


def caster(
    backbone: nn.Module,
    device: torch.device,
    method: str = "generate",
    through: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None,
) -> Callable[..., Tensor]:
    """A method of a backbone under the autocast state of this moment, its input cast to the backbone's own precision.

    It takes the method's arguments: latents, or noisy images and a noise level, and labels besides where the backbone
    is class-conditional. Backbones with ``accepts_any_float`` cast inside and get their input as it is. What is called
    is ``through(method)`` where ``through`` is given.
    """
    own = None if through is None else through(getattr(backbone, method))
    dtype = None if getattr(backbone, "accepts_any_float", False) else dtype_of(backbone)
    autocast, autocast_dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def call(images: Tensor, *others: Any) -> Tensor:
        count_passes(len(images))
        cast = images if dtype is None else images.to(dtype)
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast):
            return (own or getattr(backbone, method))(cast, *others)

    return call
