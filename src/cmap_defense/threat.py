"""Threat models: which images an attacker may turn an image into."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from cmap_defense.common.settings import Settings, require_number, setting
from cmap_defense.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor


def require_linf_size(
    owner: str, name: str, value: float, *, minimum: float | None = 0.0, above: float | None = None
) -> float:
    """A size per pixel in units of images in [0, 1], or a ``SettingsError`` that says so."""
    size = require_number(owner, name, value, minimum=minimum, above=above)
    if size > 1:
        hint = f"; did you mean {size:g}/255?" if size <= 255 else "."
        raise SettingsError(
            f"{owner}.{name} is in units of images in [0, 1], so that it must be at most 1, but is {size:g}{hint}"
        )
    return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreatModel(Settings):
    """All images in [0, 1] within a distance of the clean one.

    Attributes:
        norm: "linf" (largest absolute difference) or "l2" (Euclidean norm over C x H x W).
        eps: the distance, 0 at least, in units of images in [0, 1]: 8/255, not 8. It is at most 1 for "linf", where
            8/255 is the default, and for "l2", which has none, at most sqrt(C H W) of the images attacked.

    Raises:
        SettingsError: a value is out of its range.
    """

    norm: str = setting("linf", "Norm that bounds the perturbation.", choices=("linf", "l2"))
    eps: float = setting(
        None, "Largest perturbation, for images in [0, 1]: 8/255, not 8.", minimum=0, default_help="8/255; l2 has none"
    )

    def __post_init__(self) -> None:
        if self.eps is None:
            if self.norm == "l2":
                raise SettingsError("ThreatModel.eps has no default in l2: give one, such as 0.5 for 3 x 32 x 32.")
            object.__setattr__(self, "eps", 8 / 255)
        super().__post_init__()
        if self.norm == "linf":
            require_linf_size("ThreatModel", "eps", self.eps)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed. Another norm takes an eps of its own, or its default: sizes in one mean
        nothing in the other. Raises ``SettingsError``."""
        moved = changes.get("norm", self.norm) != self.norm
        return super().replace(**({"eps": None} | changes if moved else changes))

    def largest_eps(self, image_shape: Sequence[int]) -> float:
        """The eps that allows every image of this shape (C, H, W)."""
        return 1.0 if self.norm == "linf" else math.sqrt(math.prod(image_shape))

    def require_fit(self, image_shape: Sequence[int]) -> None:
        """Raises ``SettingsError`` when eps is larger than any distance between images of this shape (C, H, W)."""
        largest = self.largest_eps(image_shape)
        if self.eps > largest * (1 + 1e-6):
            raise SettingsError(
                f"ThreatModel.eps is in units of images in [0, 1], where images of shape {tuple(image_shape)} are at "
                f"most {largest:.4g} apart in {self.norm}, but is {self.eps:g}; did you mean {self.eps:g}/255?"
            )

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """The allowed images near ``images``, [B, C, H, W] each: clamped (linf) or shrunk (l2), then in [0, 1]."""
        import torch  # here, so that the settings alone can be imported without it

        delta = images - clean
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            length = delta.flatten(1).norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
            delta = delta * (self.eps / length).clamp_max(1.0)[:, None, None, None]
        return (clean + delta).clamp(0, 1)

    def distance(self, images: Tensor, clean: Tensor) -> Tensor:
        """[B] distances in this model's norm."""
        delta = (images - clean).flatten(1)
        return delta.abs().amax(dim=1) if self.norm == "linf" else delta.norm(dim=1)
