"""Consistency distillation: a consistency model of a denoiser (Song et al. 2023, arXiv 2303.01469, Algorithm 2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.common.settings import check_fields, setting
from cmap_defense.errors import SettingsError
from cmap_defense.training.objectives import base
from cmap_defense.training.objectives.base import Batch, Denoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class CD(base.NamedDistance):
    """Consistency distillation; the defaults are the paper's for CIFAR-10 but for the distance.

    Pairs of neighbours along the trajectories of a teacher, which takes one Heun step from the upper to the lower.

    The paper's constants (Table 3 there), all with LPIPS: CIFAR-10 N 18, mu 0, batch 512, learning rate 4e-4; ImageNet
    64 x 64 N 40, mu 0.95, batch 2048, learning rate 8e-6.

    Attributes:
        levels: N, the number of Karras levels.
        rho: their exponent (arXiv 2206.00364, eq. 5).
        distance: "l2" (squared), "l1", "pseudo-huber", or "lpips", which needs the extra ``[train]`` and the weights
            of VGG16.
        huber: c of the Pseudo-Huber distance between whole images; None for 0.00054 sqrt(C H W).
        target_decay: mu of the target's running average, below 1; None for the model itself as target (mu = 0).
        teacher: the denoiser D of Karras et al. 2022 (``EDMDenoiser.denoise``), in eval mode, on the device of the
            trained model; called without gradients. It and the following are no settings.
        teacher_source: for records and checkpoints: "name", and "kind" and "weights_sha256" where they are known.
        class_conditional: whether the teacher takes ``class_labels``; the trained model must be class-conditional too.
        lpips: the distance "lpips"; None for LPIPS with the published network.

    Raises:
        MissingExtraError, BackboneFileError: LPIPS cannot be made.
    """

    name: ClassVar[str] = "cd"
    kind: ClassVar[str] = "consistency"

    levels: int = setting(18, minimum=2)
    rho: float = setting(7.0, above=0.0)
    distance: str = setting("l2", choices=("l2", "l1", "pseudo-huber", "lpips"))
    huber: float | None = setting(None, above=0.0)
    target_decay: float | None = setting(None, minimum=0.0, below=1.0)
    teacher: Callable[..., Tensor] = dataclasses.field(repr=False, compare=False)
    teacher_source: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)
    class_conditional: bool = dataclasses.field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)  # before it is checked whether they fit together
        if self.huber is not None and self.distance != "pseudo-huber":
            raise SettingsError(
                f"CD.huber belongs to the distance 'pseudo-huber', but the distance is {self.distance!r}."
            )
        super().__post_init__()

    def losses(self, model: Denoise, batch: Batch, noise: NoiseRange, target: Denoise) -> Tensor:
        t, r = base.adjacent_levels(base.uniform_index(batch.uniform, self.levels - 1), self.levels, noise, self.rho)
        given = {"class_labels": batch.labels} if self.class_conditional else {}
        way: Any = {"distance": self._distance, "teacher": functools.partial(self.teacher, **given)}
        return base.consistency_loss(model, target, batch.images, batch.z, t, r, **way)

    def decay_at(self, progress: float) -> float | None:
        return self.target_decay

    @property
    def sources(self) -> Mapping[str, Mapping[str, Any]]:
        return {"teacher": self.teacher_source}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "teacher": self.teacher_source["name"]}
