"""What a gradient mode is given, and what it gives back."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.cmap.optimise import Callback
from cmap_defense.cmap.problem import LatentProblem
from cmap_defense.cmap.unroll import Backward
from cmap_defense.common.options import NamedOptions
from cmap_defense.common.settings import check_fields
from cmap_defense.errors import GradientError
from cmap_defense.results import PurificationResult


@dataclasses.dataclass(frozen=True)
class Purification:
    """One purification, not yet done.

    Attributes:
        images: [B, C, H, W] in [0, 1], of the backbone's size, with the graph that they came with.
        seeds: [B] int64 on the CPU, of the images' noise.
        run: the purifier on these images, without a graph.
        prepare: the latent problem, for modes that differentiate its solution; None where the purifier is not of that
            kind.
        differentiate: the purifier on these images with its gradient, taken as the argument says; None where it is an
            optimisation over latents.
        denoise: f of noisy images [B, K, C, H, W] in units of [-1, 1] and a noise level; None where the backbone has
            none.
        callback: the caller's hooks on detached states.
        live: those on states in the graph, at the iterations of ``live_at``. ``run`` calls all of them by itself, with
            detached states.
        noise: [B, K, C, H, W] of the caller's, to which ``differentiate`` has a gradient too; None where there is none,
            or the purifier is an optimisation over latents.
    """

    images: Tensor
    seeds: Tensor
    run: Callable[[], PurificationResult]
    prepare: Callable[[], LatentProblem] | None = None
    differentiate: Callable[[Backward], PurificationResult] | None = None
    denoise: Callable[[Tensor, float], Tensor] | None = None
    callback: Callback | None = None
    live: Callback | None = None
    live_at: Callable[[int], bool] = lambda iteration: True
    noise: Tensor | None = None

    @property
    def wants_gradient(self) -> bool:
        """Whether a gradient could be requested with respect to the images or the noise."""
        wanted = self.images.requires_grad or (self.noise is not None and self.noise.requires_grad)
        return wanted and torch.is_grad_enabled()

    def problem(self, mode: GradientMode) -> LatentProblem:
        """The latent problem. Raises ``GradientError`` where there is none."""
        if self.prepare is None:
            raise GradientError(
                f"{mode!r} differentiates an optimisation over latents, which this purifier is not. "
                "Use Unrolled(), which differentiates every step of any purifier."
            )
        return self.prepare()


class GradientMode(NamedOptions, abc.ABC):
    """Carries out a purification so that its images have a gradient to the input.

    A mode does the plain purification and nothing else where no gradient is wanted.

    Attributes:
        differentiates_defence: whether its gradient goes through the purification itself, exactly or approximately;
            False for one of a surrogate.
        needs_latents: whether it is of an optimisation over latents alone.
        needs_denoise: whether it needs a backbone with ``denoise``.
    """

    differentiates_defence = True
    needs_latents = False
    needs_denoise = False

    def __post_init__(self) -> None:
        """Check the fields that ``setting`` made, of a mode that is a dataclass."""
        check_fields(self)

    def without_latents(self) -> GradientMode:
        """The mode that this one is for a purifier in which no optimisation over latents takes part, with the settings
        that have no effect there at their defaults; by default itself."""
        return self

    @abc.abstractmethod
    def purify(self, purification: Purification) -> PurificationResult:
        """The result, its ``images`` [B, K, C, H, W] tied to ``purification.images``."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"
