"""Images that were attacked elsewhere, by another library or on another machine."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import Goal
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.inputs import check_finite, check_images
from cmap_defense.common.settings import setting
from cmap_defense.errors import InputValueError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Precomputed(Attack):
    """Adversarial images that are there already, for re-evaluation, or for an evaluation beside other attacks.

    An image is looked up by its clean one, in 8 bits, so that the order and the batches do not matter. As for every
    attack, what is outside the threat model is projected, and the predictions that count have fresh noise. An
    evaluation takes it for an attack that does not follow the defence's gradient. Further arguments are those of
    ``Attack``.

    Args:
        clean: float [N, C, H, W] in [0, 1], the images that were attacked.
        adversarial: float [N, C, H, W] in [0, 1], or [N, M, C, H, W] for M attempts on each of them.

    Raises:
        InputTypeError, InputValueError: the images have the wrong type, shape or values; in the call, an image is none
            of ``clean``.
    """

    clean: Tensor = setting(like="a tensor of images [N, C, H, W] in [0, 1]")
    adversarial: Tensor = setting(like="a tensor of images [N, C, H, W] or [N, M, C, H, W] in [0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(check_images(self.clean))
        shape, given = self.clean.shape, self.adversarial.shape
        if given[:1] + given[-3:] != shape or len(given) not in (4, 5) or 0 in given:
            raise InputValueError(
                f"adversarial must be {list(shape)}, as clean, or [{shape[0]}, M, {', '.join(map(str, shape[1:]))}], "
                f"but is {list(given)}."
            )
        check_finite(check_images(self.adversarial.flatten(0, -4)))

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        rows = [self._rows.get(_bytes(image), -1) for image in clean]
        if -1 in rows:
            raise InputValueError(
                f"{rows.count(-1)} of {len(rows)} images are none of those that Precomputed was given as clean: attack "
                "them too, or evaluate fewer."
            )
        found = self.adversarial[torch.tensor(rows, dtype=torch.int64, device=self.adversarial.device)].to(clean)
        return Candidates(found if found.ndim == 5 else found[:, None])

    @functools.cached_property
    def _rows(self) -> dict[bytes, int]:
        """The position of each clean image."""
        return {_bytes(image): row for row, image in reversed(list(enumerate(self.clean)))}

    def evaluates_defence(self) -> bool:
        return False

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return 0

    def __repr__(self) -> str:
        return f"Precomputed({self.threat}, {len(self.clean)} images)"


def _bytes(image: Tensor) -> bytes:
    """An image in 8 bits."""
    return (image.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy().tobytes()
