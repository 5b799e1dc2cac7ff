"""The parts of the defence: everything between an image and the vote, public and differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmap_defense.backbones.base import caster
from cmap_defense.classifier.cautions import warn_of_probabilities, warn_of_training_mode
from cmap_defense.classifier.class_labels import ClassLabels, choose_class_labels
from cmap_defense.classifier.preprocessing import Preprocessing
from cmap_defense.cmap.losses import ObjectiveTerms
from cmap_defense.cmap.objective import around_inputs, latent_chunks, objective_terms
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.voting import vote_logits
from cmap_defense.common.inputs import check_class_labels, check_logits, check_seeds, signed_word, usable
from cmap_defense.common.modules import device_of, dtype_of, evaluating
from cmap_defense.common.options import NamedOptions
from cmap_defense.common.rng import draw_latents, fresh_seeds
from cmap_defense.errors import DeviceError, InputTypeError, InputValueError, NoLatentsError, SettingsError
from cmap_defense.purifiers.base import Purifier
from cmap_defense.purifiers.cmap import CMAP

CLASSIFIER_CHUNK = 256
"""Images in one call of the classifier where ``max_parallel`` does not say."""


class LatentAccess(NamedOptions, nn.Module):
    """What a wrapped classifier is made of, and the steps of a purification one by one.

    It is the part of ``PurifiedClassifier`` that attacks on latents work with; make that.
    """

    classifier: nn.Module | Callable[[Tensor], Tensor]
    backbone: nn.Module
    purifier: Purifier
    preprocessing: Preprocessing
    vote: str
    seed: int | None
    class_labels: ClassLabels
    max_parallel: int | None

    @property
    def settings(self) -> CMAPSettings:
        """The settings of the optimisation over latents.

        Raises:
            NoLatentsError: the purifier is another one than CMAP.
        """
        try:
            return self._cmap("settings").settings
        except SettingsError as error:
            raise NoLatentsError(str(error)) from None

    def __getattr__(self, name: str) -> Any:
        if name == "settings":  # the property raised an AttributeError, whose message torch would replace
            return type(self).settings.__get__(self)
        return super().__getattr__(name)

    def _cmap(self, what: str) -> CMAP:
        """The purifier, where it is CMAP; raises ``SettingsError`` otherwise."""
        if isinstance(self.purifier, CMAP):
            return self.purifier
        inside = self.purifier.involves_latents
        where = "is out of reach inside a" if inside else "is no part of"
        raise SettingsError(
            f"{what} belongs to the optimisation over latents, which {where} {type(self.purifier).__name__}. "
            'The purifier and its own settings are model.purifier; purifier=CMAP() and preset="paper" optimise latents.'
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the backbone's images."""
        return tuple(self.backbone.image_shape)  # pyright: ignore[reportReturnType, reportArgumentType]

    def initial_latents(self, images: Tensor, *, seeds: Tensor | Sequence[int] | None = None) -> Tensor:
        """The unit latents [B, K, C, H, W] that a purification of these images starts from.

        Arguments and errors are those of ``forward``; without seeds, and without ``seed``, there are fresh ones.
        """
        unit = self.preprocessing.to_unit(images, self._device())
        drawn = draw_latents(self._seeds(seeds, None, len(unit)), self.purifier.n_latents, self.image_shape)
        return drawn.to(unit.device, unit.dtype)

    def generate(
        self,
        latents: Tensor,
        images: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """The images [B, K, C, H, W] in [0, 1] of latents [B, K, C, H, W], differentiable.

        Args:
            latents: unit, of the backbone's size.
            images: inputs as for ``forward``, [B, C, H, W], around which the latents live where the settings have a
                level; without one they are not needed, and not used.
            class_labels: [B, K] integers for a class-conditional backbone.
            size: (H, W) of the images returned, where the wrapper resizes; None for the backbone's.

        Raises:
            InputValueError: the settings have a level, and there are no images.
        """
        inputs = None if images is None else self.preprocessing.to_unit(images, self._device())
        generated = (self._generated(latents, class_labels, inputs).clamp(-1, 1) + 1) / 2
        if size is None:
            return generated
        return self.preprocessing.resized(generated.flatten(0, 1), size).unflatten(0, latents.shape[:2])

    def objective(self, latents: Tensor, images: Tensor, *, class_labels: Tensor | None = None) -> ObjectiveTerms:
        """The terms of eq. 9 that the purification minimises, and their sum, differentiable in latents and images.

        Args:
            latents: [B, K, C, H, W], unit, of the backbone's size.
            images: as for ``forward``, [B, C, H, W].
            class_labels: [B, K] integers for a class-conditional backbone.

        Returns:
            ``ObjectiveTerms``: l1 and ssim [B, K], latent and total [B].
        """
        unit = self.preprocessing.to_unit(images, self._device())
        latents = self._check_latents(latents, unit)
        small = self.preprocessing.resized(unit, self.image_shape[1:]).to(latents.dtype)
        generated = self._generated(latents, class_labels, unit)
        return objective_terms(latents, generated, small, self.settings)

    def classify_latents(self, latents: Tensor, images: Tensor | None = None, **others: Any) -> Tensor:
        """The classifier's logits [B, K, classes] on the images of latents [B, K, C, H, W], differentiable.

        The arguments are those of ``generate``.
        """
        return self._classify(self.generate(latents, images, **others))

    def undefended(self, images: Tensor, *, check: bool = True) -> Tensor:
        """The undefended classifier's logits [B, classes] on images as ``forward`` takes them, not purified.

        Args:
            check: False for images in [0, 1] or beyond that need not be valid ones, as some attacks make on their way.
        """
        return self._logits(self.preprocessing.to_unit(images, self._device()) if check else images)

    def denoiser(
        self, class_labels: Tensor | None = None, *, recompute: bool = False
    ) -> Callable[[Tensor, float], Tensor] | None:
        """f of noisy images [B, K, C, H, W] in units of [-1, 1] and a noise level; None where the backbone has none.

        Args:
            class_labels: [B, K] integers for a class-conditional backbone.
            recompute: keep no graph, but compute each chunk of ``max_parallel`` images again in the backward pass.
        """
        if getattr(self.backbone, "denoise", None) is None:
            return None

        strongest = getattr(getattr(self.backbone, "noise", None), "sigma_max", None)

        def denoised(noisy: Tensor, sigma: float) -> Tensor:
            if strongest is not None and sigma > strongest * (1 + 1e-6):
                raise SettingsError(
                    f"sigma is {sigma:g}, but the backbone was trained for levels up to {strongest:g}: choose a lower."
                )
            call = caster(self.backbone, noisy.device, "denoise")
            chunks = latent_chunks(noisy, class_labels, self.max_parallel)
            if recompute:
                parts = [checkpoint(call, images, sigma, *labels, use_reentrant=False) for images, *labels in chunks]
            else:
                parts = [call(images, sigma, *labels) for images, *labels in chunks]
            clean = torch.cat(parts)
            return clean.to(noisy.dtype).unflatten(0, noisy.shape[:2])

        return denoised

    def latent_class_labels(self, images: Tensor) -> Tensor | None:
        """The class [B, K] of each latent of these images; None where the backbone is not class-conditional."""
        return self._labels(None, self.preprocessing.to_unit(images, self._device()), self.purifier.n_latents)

    def forward_from_latents(self, latents: Tensor, images: Tensor | None = None, **others: Any) -> Tensor:
        """What ``forward`` returns when a purification ends at these latents: [B, classes], differentiable.

        The arguments are those of ``generate``.
        """
        return vote_logits(self.classify_latents(latents, images, **others), lift=self.vote == "label")

    def _generated(self, latents: Tensor, class_labels: Tensor | None, images: Tensor | None) -> Tensor:
        """The images [B, K, C, H, W] in [-1, 1] of latents, around the inputs [B, C, H, W] where there is a level."""
        if not isinstance(latents, Tensor) or latents.ndim != 5 or tuple(latents.shape[2:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            came = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise InputValueError(f"latents must be [B, K, {expected}], but are {came}.")
        if not self.purifier.optimises_latents:
            self._cmap("generate")
        backbone = self.purifier.member(self.backbone)
        classes = getattr(backbone, "num_classes", None)
        if class_labels is not None and classes is None and backbone is not self.backbone:
            class_labels = None  # those of the other backbone of a pair
        flat = None if class_labels is None else class_labels.reshape(-1)
        labels = check_class_labels(flat, latents.shape[0] * latents.shape[1], classes)
        labels = None if labels is None else labels.reshape(latents.shape[:2])
        level = self.purifier.settings.level if isinstance(self.purifier, CMAP) else None
        inputs = None
        generate = caster(backbone, latents.device, self.purifier.needs or "generate")
        if level is not None:
            if images is None or len(images) != len(latents):
                raise InputValueError(
                    f"At level {level:g} the images of latents depend on the inputs: give [{len(latents)}, C, H, W] "
                    "after the latents."
                )
            inputs = self.preprocessing.resized(images, self.image_shape[1:]).to(latents.dtype)
            generate = around_inputs(generate, level)
        generated = [generate(*given) for given in latent_chunks(latents, labels, self.max_parallel, inputs)]
        return torch.cat(generated).to(latents.dtype).unflatten(0, latents.shape[:2])

    def _device(self) -> torch.device | None:
        """Where the model is; None when neither part has weights."""
        backbone, classifier = device_of(self.backbone), device_of(self.classifier)
        if backbone is not None and classifier is not None and backbone != classifier:
            raise DeviceError(
                f"The backbone is on {backbone}, but the classifier is on {classifier}. "
                "Bring them together: model.to(device)."
            )
        return backbone or classifier

    def _seeds(self, seeds: Tensor | Sequence[int] | None, latents: Tensor | None, count: int) -> Tensor:
        """The seeds [B]: those given, or the model's own, or fresh ones. Where the latents are all of the noise they
        are not used, and 0."""
        nothing_to_draw = latents is not None and self.purifier.optimises_latents
        if seeds is not None:
            if nothing_to_draw:
                raise InputValueError("Give latents or seeds, not both: with latents there is no noise to draw.")
            return check_seeds(seeds, count)
        if nothing_to_draw or self.seed is not None:
            return torch.full((count,), signed_word(self.seed or 0), dtype=torch.int64, device="cpu")
        return fresh_seeds(count)

    def _check_latents(self, latents: Tensor, images: Tensor) -> Tensor:
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            raise InputTypeError("latents must be a floating-point tensor [B, K, C, H, W].")
        shape = (len(images), *self.image_shape)
        if latents.ndim != 5 or (latents.shape[0], *latents.shape[2:]) != shape or latents.shape[1] < 1:
            expected = f"[{shape[0]}, K, {', '.join(map(str, shape[1:]))}]"
            raise InputValueError(f"latents must be {expected} with K at least 1, but are {list(latents.shape)}.")
        if latents.device != images.device:
            raise DeviceError(f"The images are on {images.device}, but the latents are on {latents.device}.")
        if not torch.isfinite(latents).all():
            raise InputValueError("latents must be finite, but hold NaN or infinite values.")
        return usable(latents)

    def _classify(self, shown: Tensor) -> Tensor:
        """Logits [B, K, classes] of unit images [B, K, C, H, W], once, in chunks of ``max_parallel``."""
        flat = shown.flatten(0, 1)
        chunk = self.max_parallel or CLASSIFIER_CHUNK
        logits = torch.cat([self._logits(part) for part in flat.split(chunk)])
        return logits.unflatten(0, shown.shape[:2])

    def _logits(self, images: Tensor) -> Tensor:
        """The classifier's logits [M, classes], float32 at least, checked."""
        images = self.preprocessing.to_classifier(images.clone())  # a classifier may change its input in place
        dtype = dtype_of(self.classifier)
        warn_of_training_mode(self.classifier, images)
        outputs = self.classifier(images if dtype is None else images.to(dtype))
        logits = check_logits(outputs, len(images))
        warn_of_probabilities(self.classifier, outputs)
        return logits

    def _labels(self, given: object, unit: Tensor, n_latents: int) -> Tensor | None:
        """The class of each latent, [B, K]; None where the backbone is not class-conditional."""
        num_classes = getattr(self.backbone, "num_classes", None)
        return choose_class_labels(
            self.class_labels, given, unit, self._predict, n_latents=n_latents, num_classes=num_classes
        )

    def _predict(self, images: Tensor) -> Tensor:
        """The classifier's logits [B, classes] on unit images that were not purified, in eval mode."""
        with evaluating(self.classifier):
            return self._classify(images[:, None])[:, 0]
