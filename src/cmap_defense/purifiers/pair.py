"""Two backbones as one, for chains of purifiers that need different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cmap_defense.backbones.base import kind_of
from cmap_defense.backbones.record import KINDS
from cmap_defense.backbones.registry import names_of_kind
from cmap_defense.common.modules import dtype_of
from cmap_defense.errors import BackboneError, WrongKindError

__all__ = ["BackbonePair"]


class BackbonePair(nn.Module):
    """A consistency model and a denoiser; each purifier takes the one that it needs.

    Args:
        consistency: for CMAP.
        denoiser: for purifiers that denoise.

    Raises:
        BackboneError: their images have different shapes, or they are conditioned on different classes.
    """

    accepts_any_float = True

    def __init__(self, consistency: nn.Module, denoiser: nn.Module) -> None:
        super().__init__()
        self.consistency, self.denoiser = consistency, denoiser
        shapes = [tuple(getattr(member, "image_shape", ())) for member in (consistency, denoiser)]
        if shapes[0] != shapes[1]:
            raise BackboneError(
                f"The backbones of a pair must have images of one shape, but have {shapes[0]} and {shapes[1]}."
            )
        self.image_shape = shapes[0]
        classes = {n for member in (consistency, denoiser) if (n := getattr(member, "num_classes", None)) is not None}
        if len(classes) > 1:
            raise BackboneError(
                f"The backbones of a pair must be conditioned on the same classes, but have {sorted(classes)} of them."
            )
        self.num_classes = next(iter(classes), None)

    @classmethod
    def of(cls, backbones: Sequence[nn.Module]) -> BackbonePair:
        """The pair of two backbones in any order. Raises ``WrongKindError`` unless there is one of each kind."""
        by_kind = {kind_of(backbone): backbone for backbone in backbones}
        if len(backbones) != 2 or len(by_kind) != 2:
            kinds = ", ".join(kind_of(backbone) for backbone in backbones) or "nothing"
            lacking = [f'of the kind "{kind}" are: {names_of_kind(kind)}' for kind in KINDS if kind not in by_kind]
            remedy = f" For one backbone give it without a list; {'; '.join(lacking)}." if lacking else ""
            raise WrongKindError(
                f"A pair of backbones is one consistency model and one denoiser, but got {kinds}.{remedy}"
            )
        return cls(by_kind["consistency"], by_kind["denoiser"])

    def member(self, kind: str | None) -> nn.Module:
        """The one of a kind; the denoiser for None."""
        return self.consistency if kind == "consistency" else self.denoiser

    def generate(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """As the consistency model does."""
        return _call(self.consistency, "generate", class_labels, latents)

    def denoise(self, noisy: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """As the denoiser does."""
        return _call(self.denoiser, "denoise", class_labels, noisy, sigma)


def members_of(backbone: nn.Module) -> tuple[nn.Module, ...]:
    """The backbone itself, or the consistency model and the denoiser of a pair."""
    return (backbone.consistency, backbone.denoiser) if isinstance(backbone, BackbonePair) else (backbone,)


def _call(member: nn.Module, method: str, class_labels: Tensor | None, first: Tensor, *rest: Any) -> Tensor:
    """A method of one of the two, its input in that one's precision; who calls the pair counts the passes."""
    conditional = class_labels is not None and getattr(member, "num_classes", None) is not None
    dtype = None if getattr(member, "accepts_any_float", False) else dtype_of(member)
    labels = [class_labels] if conditional else []
    return getattr(member, method)(first if dtype is None else first.to(dtype), *rest, *labels)
