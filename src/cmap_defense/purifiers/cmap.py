"""CMAP as a purifier: noise, the latent loop, the K images."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cmap_defense.backbones.base import caster
from cmap_defense.cmap.objective import Generate, LatentObjective, around_inputs, stacked_terms
from cmap_defense.cmap.optimise import Callback
from cmap_defense.cmap.problem import LatentProblem, differentiable_once
from cmap_defense.cmap.settings import PRESETS, CMAPSettings
from cmap_defense.cmap.stopping import Predict
from cmap_defense.cmap.unroll import Backward
from cmap_defense.common.compiling import StepCompiler
from cmap_defense.common.rng import draw_latents
from cmap_defense.errors import SettingsError
from cmap_defense.purifiers.base import Purifier, out_of_inference_mode
from cmap_defense.results import PurificationResult

__all__ = ["CMAP"]


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class CMAP(Purifier):
    """Consistency-model adversarial purification (arXiv 2412.08394, algorithm 1 without the classifier).

    With ``CMAPSettings(level=s)`` the latents live around the input at the noise level s, which is not the paper's: see
    ``CMAPSettings``.

    Args:
        settings: K, N and the other constants; None for the defaults.

    Raises:
        SettingsError: they are something else.
    """

    optimises_latents: ClassVar[bool] = True
    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    settings: CMAPSettings

    def __init__(self, settings: CMAPSettings | None = None) -> None:
        if settings is not None and not isinstance(settings, CMAPSettings):
            raise SettingsError(
                f"CMAP is made from CMAPSettings, such as CMAP(CMAPSettings(n_latents=4)), but got {settings!r}."
            )
        object.__setattr__(self, "settings", settings or CMAPSettings())

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields of its settings changed, validated again. Raises ``SettingsError``."""
        changed = copy.copy(self)
        object.__setattr__(changed, "settings", self.settings.replace(**changes))
        return changed

    @property
    def needs(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "generate" if self.settings.level is None else "denoise"

    @property
    def kind(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "consistency" if self.settings.level is None else None

    @property
    def n_latents(self) -> int:
        return self.settings.n_latents

    @property
    def level(self) -> float | None:
        """The noise level of the latents; None for the highest."""
        return self.settings.level

    @property
    def passes(self) -> int:
        return self.settings.n_latents * (self.settings.iterations + 1)

    @property
    def call_options(self) -> frozenset[str]:
        return frozenset({"compiler"} if self.settings.stop_agreement is None else {"compiler", "predict"})

    @out_of_inference_mode
    def __call__(
        self, backbone: nn.Module, images: Tensor, *, callback: Callback | None = None, **options: Any
    ) -> PurificationResult:
        """Purify images: ``prepare``, whose arguments are the others here, then solve; without a graph.

        Args:
            backbone: as for ``prepare``.
            images: likewise.
            callback: see ``Callback``; None for none.
            options: ``seeds`` and others of ``prepare``.
        """
        return self.prepare(backbone, images, **options).solve(callback)

    def differentiate(
        self, backbone: nn.Module, images: Tensor, *, backward: Backward, **options: Any
    ) -> PurificationResult:
        """The call with its unrolled gradient to the images; arguments as for the base class."""
        callback = options.pop("callback", None)
        return self.prepare(backbone, images, **options).unrolled(backward, callback=callback)

    def prepare(
        self,
        backbone: nn.Module,
        images: Tensor,
        *,
        seeds: Tensor,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        max_parallel: int | None = None,
        predict: Predict | None = None,
        compiler: StepCompiler | None = None,
    ) -> LatentProblem:
        """What there is to minimise for these images.

        Args:
            backbone: satisfies the backbone protocol; on the images' device.
            images: [B, C, H, W] in [0, 1], of the backbone's image shape; they keep their graph.
            seeds: [B] int64 on the CPU; each image's noise is drawn from its own.
            latents: [B, K, C, H, W], a start in place of the noise.
            class_labels: [B, K] integers for a class-conditional backbone, None for another.
            max_parallel: latents at once; None for what fits.
            predict: images to labels, needed where the settings have ``stop_agreement``.
            compiler: compiles the backbone and the distances for the loop; second derivatives and the images at its
                end go without it.

        Returns:
            The problem, in float32 or the images' precision where that is higher.
        """
        self.check(backbone)
        if getattr(self.member(backbone), "num_classes", None) is None:
            class_labels = None  # those of the other backbone of a pair
        dtype = torch.promote_types(images.dtype, torch.float32)
        start = draw_latents(seeds, self.settings.n_latents, images.shape[1:]) if latents is None else latents.detach()
        start = start.to(images.device, dtype)
        images = differentiable_once(images.to(dtype))
        if max_parallel is None and start.numel():
            fitting = functools.partial(self.fitting, backbone, images.shape[1:], images.device)
            place = (images.shape[1:], images.device, dtype)
            max_parallel = fitting() if compiler is None else compiler.kept_size(place, fitting)
        generate, fast, fast_terms = self._generator(backbone, images.device), None, None
        if compiler is not None:
            every = max(1, start.shape[0] * start.shape[1])
            through = functools.partial(compiler, size=min(max_parallel or every, every))
            fast = self._generator(backbone, images.device, functools.partial(through, graphs=True))
            fast_terms = through(stacked_terms)
        with torch.autocast(images.device.type, enabled=False):
            objective = LatentObjective(
                generate,
                images.detach(),
                start.shape[1],
                self.settings,
                class_labels=class_labels,
                max_parallel=max_parallel,
                fast=fast,
                fast_terms=fast_terms,
            )
        return LatentProblem(objective, images, start, None if latents is not None else seeds, predict)

    def _generator(self, backbone: nn.Module, device: torch.device, through: Any = None) -> Generate:
        """The generator, under the autocast state of this moment."""
        own, level = self.member(backbone), self.settings.level
        if level is None:
            return caster(own, device, through=through)
        return around_inputs(caster(own, device, "denoise", through), level)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """CMAP from the fields of its settings. Raises ``SettingsError`` where they do not fit."""
        return cls(CMAPSettings.from_dict(values))

    def to_dict(self) -> dict[str, Any]:
        """The fields of its settings, as JSON-ready values."""
        return self.settings.to_dict()

    def __repr__(self) -> str:
        return f"CMAP({self.settings})"
