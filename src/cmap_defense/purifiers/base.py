"""What every purification defence looks like from outside."""

from __future__ import annotations

import abc
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cmap_defense.backbones.base import caster, check_backbone, kind_of
from cmap_defense.backbones.registry import names_of_kind
from cmap_defense.cmap.memory import default_max_parallel
from cmap_defense.cmap.unroll import Backward
from cmap_defense.common.describe import describe, qualified_name
from cmap_defense.common.inputs import usable
from cmap_defense.common.options import NamedOptions
from cmap_defense.common.rng import draw_latents
from cmap_defense.common.settings import require_integer, require_number
from cmap_defense.errors import PurifierError, SettingsError, UnknownNameError, WrongKindError
from cmap_defense.purifiers.pair import BackbonePair
from cmap_defense.results import PurificationResult

__all__ = ["Purifier"]

ROUNDING = 1e-3
"""How far a purified image may be outside [0, 1]."""


class Purifier(NamedOptions, abc.ABC):
    """Images in, K purified versions of each out: frozen settings plus a call; it owns no weights.

    A subclass writes ``n_latents``, ``passes`` and the call.

    Attributes:
        needs: the method of a backbone that it uses: "generate", "denoise", or None for neither.
        kind: the kind of backbone that it needs, "consistency" or "denoiser"; None for either.
        optimises_latents: whether it is an optimisation over latents, as ``CMAP`` and its subclasses are, and no other.
            The call of any other purifier is differentiable with respect to the images.
    """

    needs: ClassVar[str | None] = "denoise"
    kind: ClassVar[str | None] = None
    optimises_latents: ClassVar[bool] = False
    _sets_level: ClassVar[str] = "level"
    """The setting that decides about ``level``, the strongest noise, where there is one."""
    _graphs: ClassVar[int] = 1
    """Graphs of the network in memory at once, in units of that of a backward pass."""
    _synonyms: ClassVar[Mapping[str, str]] = {"k": "n_latents", "lr": "learning_rate"}
    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    _without_presets: ClassVar[str] = "It has none."

    @property
    @abc.abstractmethod
    def n_latents(self) -> int:
        """K, the number of purified versions of an image."""

    @property
    @abc.abstractmethod
    def passes(self) -> int:
        """The largest number of network passes that an image takes."""

    @abc.abstractmethod
    def __call__(
        self,
        backbone: nn.Module,
        images: Tensor,
        *,
        seeds: Tensor,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        callback: Callable[[Any], Any] | None = None,
        max_parallel: int | None = None,
    ) -> PurificationResult:
        """Purify images.

        Args:
            backbone: has the method that ``needs`` names; on the images' device. Or a pair that has it.
            images: [B, C, H, W] in [0, 1], of the backbone's size.
            seeds: [B] int64 on the CPU; each image's noise is drawn from its own, so that the result does not depend on
                the batch.
            latents: [B, K, C, H, W] unit noise in place of the first that is drawn from the seeds; None for none.
            class_labels: [B, K] integers for a class-conditional backbone, None for another.
            callback: called before each step with its state; None for none.
            max_parallel: images in one call of the backbone; None for what fits.

        Returns:
            The purified images and the noise they came from. A classifier is not involved.
        """

    @property
    def involves_latents(self) -> bool:
        """Whether it optimises latents, or is a chain with a purifier that does."""
        return self.optimises_latents

    @property
    def call_options(self) -> frozenset[str]:
        """Arguments that its call takes besides those above, and that ``PurifiedClassifier`` gives: "predict", a
        function from images [M, C, H, W] in [0, 1] of the backbone's size to labels [M]; "compiler", a ``StepCompiler``
        or None."""
        return frozenset()

    def differentiate(
        self, backbone: nn.Module, images: Tensor, *, backward: Backward, **options: Any
    ) -> PurificationResult:
        """The call with its exact gradient to the images.

        Args:
            backbone: as for the call.
            images: as for the call.
            backward: how the gradient is taken. This method leaves it out of account and relies on the call.
            options: the other arguments of the call.

        Returns:
            The result of the call, its images tied to ``images``.
        """
        return self(backbone, images, **options)

    def member(self, backbone: nn.Module) -> nn.Module:
        """The backbone, or of a pair the one that this purifier uses."""
        return backbone.member(self.kind) if isinstance(backbone, BackbonePair) else backbone

    def check(self, backbone: nn.Module) -> None:
        """Raise where a backbone is not what the purifier needs.

        Raises:
            WrongKindError: it is of another kind.
            BackboneError: it does not have the method that ``needs`` names.
            SettingsError: it was not trained for noise as strong as ``level``.
        """
        used = check_backbone(self.member(backbone), None)
        usable = any(callable(getattr(used, method, None)) for method in ("generate", "denoise"))
        if self.kind is not None and usable and kind_of(used) != self.kind:
            raise WrongKindError(
                f"{type(self).__name__} needs {_CALLED[self.kind]}, but {_named(used)} is "
                f"{_CALLED[kind_of(used)]}. {_WHY[self.kind]} Of that kind are: {names_of_kind(self.kind)}; "
                f'and modules of yours with kind = "{self.kind}".'
            )
        check_backbone(used, self.needs)
        level = getattr(self, "level", None)
        strongest = getattr(getattr(used, "noise", None), "sigma_max", None)
        if level is not None and strongest is not None and level > strongest:
            setting = self._sets_level
            meaning = "" if setting == "level" else f", noise of level {level:g}"
            value = level if setting == "level" else getattr(self, setting)
            raise SettingsError(
                f"{type(self).__name__}.{setting} is {value}{meaning}, but the backbone was trained for levels up to "
                f"{strongest:g}: choose a lower {setting}."
            )

    def fitting(self, backbone: nn.Module, image_shape: Sequence[int], device: torch.device) -> int:
        """The images that fit into one call of the backbone, with what a gradient keeps of them; 1 at least.

        Args:
            backbone: as for the call.
            image_shape: (C, H, W).
            device: where it is. On a CPU a fixed budget of 2 GiB takes the place of the free memory.
        """
        own, call = self._network(backbone, device)
        conditional = getattr(own, "num_classes", None) is not None
        owner = None if self.needs is None else own
        fitting = default_max_parallel(call, image_shape, device, conditional=conditional, owner=owner)
        return max(1, fitting // self._graphs)

    def sample(self, backbone: nn.Module, image_shape: Sequence[int], device: torch.device) -> Tensor:
        """What the backbone makes of fixed noise in one pass, by which two backbones can be distinguished.

        Args:
            backbone: as for the call.
            image_shape: (C, H, W).
            device: where it is.

        Returns:
            [1, C, H, W] in units of [-1, 1], not clipped.
        """
        own, call = self._network(backbone, device)
        noise = draw_latents(torch.zeros(1, dtype=torch.int64, device="cpu"), 1, image_shape)[0].to(device)
        classes = getattr(own, "num_classes", None)
        labels = () if classes is None or self.needs is None else (torch.zeros(1, dtype=torch.int64, device=device),)
        with torch.no_grad():
            return call(noise, *labels)

    def _network(self, backbone: nn.Module, device: torch.device) -> tuple[nn.Module, Callable[..., Tensor]]:
        """The backbone that is used, and its network as a function of latents or noisy images and of class labels."""
        own = self.member(backbone)
        if self.needs is None:
            return own, lambda images, *_: images
        call, level = caster(own, device, self.needs), getattr(self, "level", 0.0) or 1.0
        return own, call if self.needs == "generate" else lambda noisy, *labels: call(noisy, level, *labels)

    @classmethod
    def preset(cls, name: str) -> Self:
        """The settings of a paper by name, such as "cifar10-linf".

        Args:
            name: of the data set and the threat model.

        Raises:
            UnknownNameError: there is no such preset; the message lists those that there are.
        """
        if not isinstance(name, str) or name not in cls._presets:
            known = f"There are: {', '.join(cls._presets)}." if cls._presets else cls._without_presets
            raise UnknownNameError(f"{cls.__name__} has no preset {name!r}. {known}")
        return cls.from_dict(cls._presets[name])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A purifier from its settings. Raises ``SettingsError`` where they do not fit."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values; by default the class and the attributes by name."""
        attributes = {name: describe(value) for name, value in vars(self).items()}
        return {"class": qualified_name(self), **attributes}


def check_purifier(purifier: Purifier) -> Purifier:
    """The purifier. Raises ``PurifierError`` where what it declares is not valid, or its call does not take what
    ``PurifiedClassifier`` gives."""
    name = type(purifier).__name__
    for attribute, known in (("needs", ("generate", "denoise", None)), ("kind", ("consistency", "denoiser", None))):
        found = getattr(purifier, attribute)
        if found not in known:
            raise PurifierError(f"{name}.{attribute} must be {known[0]!r}, {known[1]!r} or None, but is {found!r}.")
    try:
        require_integer(name, "n_latents", purifier.n_latents, minimum=1)
        require_integer(name, "passes", purifier.passes, minimum=0)
        level = getattr(purifier, "level", None)
        if level is not None:
            require_number(name, "level", level.item() if getattr(level, "ndim", 1) == 0 else level, minimum=0)
    except SettingsError as error:
        raise PurifierError(str(error)) from error
    given = ("seeds", "latents", "class_labels", "callback", "max_parallel", *purifier.call_options)
    try:
        inspect.signature(purifier, follow_wrapped=False).bind(None, None, **dict.fromkeys(given))
    except TypeError as error:
        raise PurifierError(
            f"{name} must be called as purifier(backbone, images, *, {', '.join(given)}), but its "
            f"__call__ is another: {error}. Arguments that it does not use can be **options, and settings belong to "
            "its constructor."
        ) from error
    return purifier


def check_purified(result: object, images: Tensor, n_latents: int, name: str) -> PurificationResult:
    """The result. Raises ``PurifierError`` unless a purifier of this name returned K versions in [0, 1] of images
    [B, C, H, W]."""
    if not isinstance(result, PurificationResult):
        raise PurifierError(f"{name} must return a PurificationResult, but returned {type(result).__name__}.")
    expected, purified = [len(images), n_latents, *images.shape[1:]], result.images
    if not isinstance(purified, Tensor) or list(purified.shape) != expected:
        came = list(purified.shape) if isinstance(purified, Tensor) else type(purified).__name__
        raise PurifierError(
            f"{name} must return images [B, K, C, H, W], here {expected} since K is {n_latents} (n_latents, or that of "
            f"the latents given), but returned {came}."
        )
    if not purified.numel():
        return result
    low, high = torch.stack(purified.detach().aminmax()).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PurifierError(f"{name} returned NaN or infinite images.")
    if low < -ROUNDING or high > 1 + ROUNDING:
        signed = " From [-1, 1] it is (images + 1) / 2." if low > -1 - ROUNDING and high < 1 + ROUNDING else ""
        raise PurifierError(f"{name} must return images in [0, 1], but they go from {low:.4g} to {high:.4g}.{signed}")
    return result


def _named(backbone: nn.Module) -> str:
    """What a user knows a backbone by."""
    return getattr(getattr(backbone, "record", None), "name", None) or type(backbone).__name__


_CALLED = {"consistency": "a consistency model", "denoiser": "a denoiser"}
_WHY = {
    "consistency": "A denoiser has no one-step generator.",
    "denoiser": "A consistency function gives the end point of the ODE, and a reverse step needs the mean of the clean "
    "images.",
}


def out_of_inference_mode(call: Callable[..., PurificationResult]) -> Callable[..., PurificationResult]:
    """A purifier's ``__call__`` that takes gradients on its way, which torch.inference_mode would not let it do."""

    @functools.wraps(call)
    def carried_out(purifier: Purifier, backbone: nn.Module, images: Tensor, **options: Any) -> PurificationResult:
        if not torch.is_inference_mode_enabled():
            return call(purifier, backbone, images, **options)
        with torch.inference_mode(False), torch.no_grad():
            given = {name: usable(value) if isinstance(value, Tensor) else value for name, value in options.items()}
            return call(purifier, backbone, usable(images), **given)

    return carried_out
