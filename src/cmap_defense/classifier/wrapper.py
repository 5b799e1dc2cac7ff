"""The defence as a module: images in, logits out."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from cmap_defense.classifier.access import LatentAccess
from cmap_defense.classifier.cautions import warn_of_another_adaptation
from cmap_defense.classifier.class_labels import ClassLabels, require_class_labels
from cmap_defense.classifier.hooks import StepHook, StepHooks, together
from cmap_defense.classifier.prediction import Calibration, Prediction, calibration_of, check_calibration, prediction_of
from cmap_defense.classifier.preprocessing import Preprocessing
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.stopping import Predict
from cmap_defense.cmap.unroll import Backward
from cmap_defense.cmap.voting import count_votes, log_mean_probability, majority_label, vote_logits, vote_margin
from cmap_defense.common.compiling import StepCompiler
from cmap_defense.common.convert import to_batch
from cmap_defense.common.modules import (
    building,
    device_of,
    evaluating,
    in_fastest_layout,
    multiplies_bfloat16,
    weights_of,
)
from cmap_defense.common.options import unknown_option
from cmap_defense.common.progress import OnProgress, showing_passes
from cmap_defense.common.settings import require_choice, require_flag, require_integer
from cmap_defense.errors import BackboneWarning, ClassifierError, SettingsError
from cmap_defense.gradients import GradientMode, Purification, StraightThrough, Unrolled
from cmap_defense.purifiers.base import Purifier, check_purified, check_purifier
from cmap_defense.purifiers.choice import loaded_with
from cmap_defense.purifiers.cmap import CMAP
from cmap_defense.purifiers.pair import BackbonePair, members_of
from cmap_defense.results import History, PurificationResult

__all__ = ["PurifiedClassifier"]

ANY: Any = -math.inf
"""No lower bound."""


class PurifiedClassifier(LatentAccess):
    """A classifier behind a purifier: images in, logits out.

        model = PurifiedClassifier(my_resnet, backbone="fashion-mnist-ct")
        logits = model(images)

    Where settings, purifier and preset are left out, the backbone's record decides: its preset "balanced", else its
    preset "fast", else CMAP (arXiv 2412.08394). The object's repr shows which it is.

    Args:
        classifier: any ``nn.Module`` or callable, images [M, C, H, W] to logits [M, classes], 2 classes at least, used
            in the mode it is in. A ``ClassifierWarning`` says that it is in training mode where nothing can be trained,
            or that it returns probabilities.
        backbone: a name, a Hub id, a local folder (see ``load_backbone``), or any ``nn.Module`` with ``image_shape``
            and ``generate``, or ``denoise`` for purifiers that denoise. One that is loaded here joins the classifier's
            device; a module is used as it is, in eval mode. Two of them, ``("cifar10-ct-small", "cifar10-edm-small")``,
            are a consistency model and a denoiser for a chain of purifiers.
        settings: of CMAP, all of them: the short form of ``purifier=CMAP(settings)``. Of a model that runs CMAP,
            ``settings=model.settings.replace(...)`` changes one of them.
        purifier: what purifies, an object of ``cmap_defense.purifiers`` such as ``DiffPure(t=100)``, or one of
            yours.
        preset: in place of settings and purifier, one that goes with the backbone: "paper", CMAP as published, on any
            consistency model; "balanced" or "fast" where the backbone's record names them.
        normalize: (mean, std), numbers or one number per channel, that the classifier expects, or torchvision's
            ``Normalize(mean, std)``; applied after purification.
        inputs: "unit" for images in [0, 1]; "normalized" or "normalised" for images that went through ``normalize``.
        resize: how to resize images of another size to the backbone's and back: "bilinear", "bicubic", "area" or
            "nearest-exact" (True means "bilinear"); None refuses them.
        vote: "label": the top logit is the majority vote of eq. 14. "soft": it is the highest mean probability.
        seed: every image uses the noise of this seed; None for fresh noise on each call.
        gradient: how the gradient to the input is taken, an object of ``cmap_defense.gradients``. None is
            ``Unrolled()``, which is exact, so that whatever differentiates the model attacks the defence itself; and
            ``StraightThrough()``, an approximation (BPDA), where CMAP is the purifier or part of a chain.
        class_labels: for a class-conditional backbone, the class that the latents of an image are generated under:
            "predicted", the classifier's top label on the input, which on an attacked image is the attacker's (an
            unconditional backbone has no such weakness); "spread", its K most likely ones, one per latent; or a
            function from images [B, C, H, W] in [0, 1] to labels [B] or [B, K].
        dtype: precision of the backbone's weights and passes alone; a module of yours is copied. None leaves it as it
            is: float32 where it is loaded by name, so that figures do not depend on the processor. "auto" is bfloat16
            where the backbone's device multiplies it natively (CPUs with AMX or AVX-512 BF16, CUDA devices from compute
            capability 8), and None elsewhere.
        compile: whether the loop of CMAP runs through torch.compile, for one batch size; on CUDA the backbone as CUDA
            graphs. The first call takes up to minutes. Where it fails, or gives other results, there is one
            ``CompileWarning``, and the loop runs without; so do replicas of ``nn.DataParallel``.
        max_parallel: latents in one call of the backbone, images in one call of the classifier; None for what fits
            and for 256. Methods that take latents run all of them at once for None.
        out_of_range: what is done with values more than 1e-4 outside [0, 1]. "clamp": they are clamped, and the
            gradient to the input passes as if they were not. "raise": they are an error. "auto": they are clamped while
            a gradient to the images is wanted. Otherwise those within 0.5 of [0, 1] are clamped with one
            ``InputRangeWarning`` for each model, and values further out are an error, as NaN always is.

    Raises:
        SettingsError: an option is out of its range, there is more than one of settings, purifier and preset, or the
            backbone was not trained for the purifier's noise level.
        BackboneError: the backbone does not have what the purifier needs.
        UnknownNameError: there is no backbone of this name, or its record has no such preset.
        BackboneFileError: a backbone given by name cannot be loaded.
    """

    _synonyms: ClassVar[Mapping[str, str]] = {
        "batch_size": "max_parallel",
        "model": "classifier",
        "random_state": "seed",
        "steps": "iterations",
        "k": "n_latents",
        "n": "iterations",
    }
    _advice: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("mean", "std"), "Give both together: PurifiedClassifier(..., normalize=(mean, std))."),
        "device": "Move the model: PurifiedClassifier(...).to(device). A backbone given by name joins the classifier.",
        "eps": "The eps of an attack is an option of ThreatModel, that of Adam one of CMAPSettings: "
        "PurifiedClassifier(..., settings=CMAPSettings(eps=...)).",
        "seeds": "Seeds of single images are given to the call: model(images, seeds=...).",
    }

    def __init__(
        self,
        classifier: nn.Module | Callable[[Tensor], Tensor],
        backbone: str | os.PathLike[str] | nn.Module | Sequence[str | os.PathLike[str] | nn.Module],
        *,
        settings: CMAPSettings | None = None,
        purifier: Purifier | None = None,
        preset: str | None = None,
        normalize: tuple[Sequence[float] | float, Sequence[float] | float] | nn.Module | None = None,
        inputs: str = "unit",
        resize: str | bool | None = None,
        vote: str = "label",
        seed: int | None = None,
        gradient: GradientMode | None = None,
        class_labels: ClassLabels = "predicted",
        dtype: torch.dtype | str | None = None,
        compile: bool = False,  # noqa: A002 - as in torch's name for it
        max_parallel: int | None = None,
        out_of_range: str = "auto",
    ) -> None:
        super().__init__()
        if not callable(classifier) or isinstance(classifier, type):
            raise ClassifierError(f"The classifier must be an nn.Module or a callable instance, but is {classifier!r}.")
        if any(weight.is_inference() for weight in weights_of(classifier)):
            raise ClassifierError("The classifier's weights were made under torch.inference_mode: load it outside.")
        name = "PurifiedClassifier"
        self.vote = require_choice(name, "vote", vote, ("label", "soft"))
        self.seed = None if seed is None else require_integer(name, "seed", seed, minimum=ANY)
        if max_parallel is not None:
            max_parallel = require_integer(name, "max_parallel", max_parallel, minimum=1)
        self.max_parallel = max_parallel
        self._gradient: GradientMode | None = _made(
            gradient, "gradient", GradientMode, "Unrolled() or StraightThrough()", "gradients"
        )
        self.class_labels = require_class_labels(class_labels)
        if settings is not None and not isinstance(settings, CMAPSettings):
            raise SettingsError(f"PurifiedClassifier.settings must be CMAPSettings, but is {settings!r}.")
        _made(purifier, "purifier", Purifier, "CMAP() or OneStep(level=0.5)", "purifiers")
        if purifier is not None:
            check_purifier(purifier)
        if sum(given is not None for given in (settings, purifier, preset)) > 1:
            raise SettingsError(
                "Give settings, purifier or preset, one of them: settings=... is the short form of "
                "purifier=CMAP(settings), and a preset is a purifier with settings."
            )
        wanted = preset if purifier is None and settings is None else purifier or CMAP(settings)
        loaded, wanted = loaded_with(backbone, wanted, device_of(classifier))
        self.backbone: nn.Module = _in_precision(loaded, dtype)
        self.backbone.eval()
        self.classifier = classifier  # after the backbone: attacks on features take the module that is registered last
        self.purifier = wanted
        warn_of_another_adaptation(classifier, self.backbone, wanted)
        if require_flag(name, "compile", compile) and "compiler" not in wanted.call_options:
            raise SettingsError(
                f"compile=True compiles the loop of CMAP, which {type(wanted).__name__} lacks: leave it out."
            )
        self._compiler = StepCompiler() if compile else None
        self.preprocessing = Preprocessing.of(self.image_shape, inputs, normalize, resize, out_of_range)
        self._step_hooks = StepHooks()
        self.calibration: Calibration | None = None

    @property
    def gradient(self) -> GradientMode:
        """How the gradient to the input is taken."""
        if self._gradient is not None:
            return self._gradient
        return StraightThrough() if self.purifier.involves_latents else Unrolled()

    def forward(
        self,
        images: Tensor,
        *,
        seeds: Tensor | Sequence[int] | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of purified images.

        Args:
            images: float [B, C, H, W], in [0, 1] or normalised, as ``inputs`` says; other values are treated as
                ``out_of_range`` says. The error about anything else has the line that converts it.
            seeds: [B] integers, one per image; None for ``seed``, or fresh ones from torch's CPU generator.
            class_labels: [B] or [B, K] integers for a class-conditional backbone, in place of the choice made at
                construction.

        Returns:
            [B, classes], float32 at least, all finite: the log of the mean probability over the K purified images and,
            with ``vote="label"``, the majority label of eq. 14 on top. An empty batch gives an empty result.

        Raises:
            InputTypeError: the images or seeds are of another type; the message says what to do.
            InputValueError: their values or shapes are not as above.
            DeviceError: they are on another device.
            ClassifierError: the classifier did not return finite logits [M, classes].
            BackboneError: the backbone broke its promise.
            PurifierError: the purifier returned something else than K images in [0, 1].
            GradientError: the images require a gradient that the gradient mode cannot give.
        """
        logits = self._purify(images, None, seeds, class_labels).logits
        assert logits is not None
        return vote_logits(logits, lift=self.vote == "label")

    def purify(
        self,
        images: Tensor | np.ndarray | Image.Image | Sequence[Any],
        *,
        latents: Tensor | None = None,
        seeds: Tensor | Sequence[int] | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        callback: Callable[[Any], Any] | None = None,
        progress: OnProgress = None,
    ) -> PurificationResult:
        """The K purified versions of each image, and how they were found.

        Args:
            images: as for ``forward``, or a single image [C, H, W], for which B is 1; also uint8. Or a numpy array
                [B, H, W, C], [H, W, C] or, of one channel, [H, W], uint8 or floating-point; a PIL image, which becomes
                grey or RGB as the backbone's are; or a list of single images of one size. 8-bit and PIL images are
                not normalised, whatever ``inputs`` says. What is no tensor is moved to the model's device.
            latents: [B, K, C, H, W] unit latents of the backbone's size to start from, instead of noise.
            seeds: as for ``forward``; not together with ``latents`` where these are all of the noise, as for CMAP.
            class_labels: as for ``forward``; the labels in use are in the result.
            callback: called with the state before each step: a step hook for this call alone, such as
                ``Trajectory()``.
            progress: True for a bar on standard error, or a function of (done, total): network passes, and the most
                that there can be.

        Returns:
            All of ``PurificationResult``. Its ``images`` have the size of the input and
            carry the input's gradient as ``gradient`` says.

        It raises the errors of ``forward``.
        """
        if callback is not None and not callable(callback):
            raise SettingsError(f"callback must be a function such as Trajectory(), but is {callback!r}.")
        return self._purify(self._batch(images), latents, seeds, class_labels, progress, callback)

    def predict(
        self,
        images: Tensor | np.ndarray | Image.Image | Sequence[Any],
        *,
        seeds: Tensor | Sequence[int] | None = None,
        progress: OnProgress = None,
    ) -> Prediction:
        """Labels with their confidence and, after ``calibrate``, whether they are withheld.

        An attacker who knows the thresholds can aim below them: a prediction that is not withheld is no proof.

        Args:
            images: as for ``purify``.
            seeds: as for ``forward``.
            progress: as for ``purify``.

        Returns:
            The prediction, without gradients. It raises the errors of ``forward``.
        """
        batch = self._batch(images)
        with torch.no_grad():
            result = self._purify(batch, None, seeds, None, progress)
            unit = self.preprocessing.to_unit(batch, self._device())
            undefended = self._classify(unit[:, None]) if len(unit) else result.logits
            assert undefended is not None
            return prediction_of(result, unit, undefended[:, 0], self.calibration)

    def calibrate(
        self,
        images: Tensor | np.ndarray | Sequence[Any],
        *,
        coverage: float = 0.95,
        restored: float = 0.99,
        score: str = "confidence",
        seeds: Tensor | Sequence[int] | None = None,
        progress: OnProgress = None,
    ) -> Calibration:
        """Choose the thresholds of ``predict`` on clean images, and keep them as ``self.calibration``.

        Args:
            images: clean images [B, C, H, W] that are used for nothing else, as for ``purify``; some hundreds.
            coverage: share of clean images whose prediction is not withheld.
            restored: share of clean images that count as restored.
            score: "confidence" in the predicted label, or "agreement" with the label before purification.
            seeds: as for ``forward``.
            progress: as for ``purify``.

        Raises:
            SettingsError: a share is not above 0 and at most 1, or there is no such score.
            InputValueError: there are no images.
        """
        check_calibration(coverage, restored, score)
        clean = self.predict(images, seeds=seeds, progress=progress)
        self.calibration = calibration_of(clean, coverage=coverage, restored=restored, score=score)
        return self.calibration

    def _batch(self, images: object) -> Any:
        """What people give as images, as a batch for ``forward``."""
        batch, unit = to_batch(images, self.image_shape[0])
        if isinstance(batch, Tensor) and not isinstance(images, Tensor):
            batch = batch.to(self._device())
        if isinstance(batch, Tensor) and unit and self.preprocessing.inputs == "normalized":
            batch = self.preprocessing.to_classifier(batch)
        return batch

    def on_unit_images(self) -> PurifiedClassifier:
        """This wrapper where it takes images in [0, 1], as attacks and evaluations do; else a variant that does, which
        shares its hooks."""
        return self if self.preprocessing.inputs == "unit" else self.variant(hooks=True, inputs="unit")

    def variant(self, *, hooks: bool = False, **changes: Any) -> PurifiedClassifier:
        """Another wrapper around the same classifier and backbone, with some of the options changed.

        Args:
            hooks: share the step hooks of this one, those to come included; without, the variant has none.
            changes: those of the constructor but for the classifier and the backbone, such as ``gradient=Unrolled()``
                or ``settings=model.settings.replace(iterations=20)``. It raises the constructor's errors.
        """
        normalisation = self.preprocessing.normalisation
        options: dict[str, Any] = {
            "settings": None,
            "purifier": self.purifier,
            "preset": None,
            "normalize": None if normalisation is None else (normalisation.mean, normalisation.std),
            "inputs": self.preprocessing.inputs,
            "resize": self.preprocessing.resize,
            "vote": self.vote,
            "seed": self.seed,
            "gradient": self._gradient,
            "class_labels": self.class_labels,
            "dtype": None,
            "compile": self._compiler is not None,
            "max_parallel": self.max_parallel,
            "out_of_range": self.preprocessing.out_of_range,
        }
        for name in changes:
            if name in ("classifier", "backbone"):
                raise SettingsError(
                    f"A variant has no option {name!r} to change: it shares the {name}. "
                    "Make another PurifiedClassifier."
                )
            if name not in options:
                raise SettingsError(unknown_option(PurifiedClassifier, name, changes[name]))
        if "settings" in changes or changes.get("preset") is not None:
            options["purifier"] = None
        other = PurifiedClassifier(self.classifier, self.backbone, **(options | changes))
        other.training = self.training
        if other._compiler is not None and other.backbone is self.backbone:
            other._compiler = self._compiler or other._compiler  # what is compiled is kept
        if hooks:
            other._step_hooks = self._step_hooks
        return other

    def register_step_hook(
        self, hook: Callable[[Any], Any], *, steps: Container[int] | None = None, live: bool = False
    ) -> RemovableHandle:
        """Call ``hook`` with the state before each step.

        It is the ``LatentState`` of CMAP, or the ``StepState`` of another purifier. Latents or images that it returns
        take the place of the state's; only one hook may do so at a step. Hooks run in the order of their registration;
        copies and pickles have none. The handle removes the hook, also as a context manager. Each purifier of a chain
        calls it, with steps of its own.

        Args:
            hook: called once per step, never again while a gradient is taken.
            steps: those at which it is called, such as ``range(0, 200, 10)``; None for all. The first is 0.
            live: give it states in the graph to the input, and keep what it returns in it. Needs
                ``gradient=Unrolled()``; where the input requires no gradient, states are detached.

        Raises:
            SettingsError: the hook is not callable, the purifier makes no steps, or the hook is live without an
                unrolled gradient or in a chain with CMAP; a later call in another gradient mode raises it too.
        """
        if not callable(hook):
            raise SettingsError(f"A step hook must be callable, but is {hook!r}.")
        if not self.purifier.passes:
            raise SettingsError(f"{self.purifier!r} makes no steps, so that a hook would never be called.")
        if steps is not None and not isinstance(steps, Container):
            raise SettingsError(f"steps must be a set or range of numbers, but is {steps!r}.")
        if live and not isinstance(self.gradient, Unrolled):
            raise SettingsError(
                f"A live hook needs PurifiedClassifier(..., gradient=Unrolled()), but this one has {self.gradient!r}: "
                "no other mode has a graph through the steps."
            )
        if live and self.purifier.involves_latents and not self.purifier.optimises_latents:
            raise SettingsError(
                f"A live hook sees no graph of the optimisation over latents inside a {type(self.purifier).__name__}: "
                "hook a model of each purifier, or leave live out."
            )
        return self._step_hooks.register(hook, steps, live)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for member in members_of(self.backbone):
            name, place = getattr(getattr(member, "record", None), "name", None), f"{prefix}backbone."
            if name is None:
                continue
            if isinstance(self.backbone, BackbonePair):
                place += "consistency." if member is self.backbone.consistency else "denoiser."
            pairs = ((own, state_dict.get(place + key)) for key, own in member.state_dict().items())
            if any(given is not None and _other_values(own, given) for own, given in pairs):
                warnings.warn(
                    f"The state dict has other weights of the backbone than {name!r}, which this model was made with "
                    "and still names. Make it with the backbone that the state dict is of. The purifier, normalisation "
                    "and thresholds are not in it either.",
                    BackboneWarning,
                    stacklevel=4,
                )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def train(self, mode: bool = True) -> Self:
        """Set the classifier's mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def extra_repr(self) -> str:
        return (
            f"purifier: {self.purifier!r}\n"
            f"K = {self.purifier.n_latents}, network passes per image: {self.purifier.passes:,}\n"
            f"gradient={self.gradient!r}, vote={self.vote!r}, inputs={self.preprocessing.inputs!r}, "
            f"out_of_range={self.preprocessing.out_of_range!r}"
        )

    def __repr__(self) -> str:
        parts = {"classifier": self.classifier, "backbone": self.backbone}
        if isinstance(self.backbone, BackbonePair):
            parts = {"classifier": self.classifier, **self.backbone._modules}
        lines = [f"{name}: {_summary(part)}" for name, part in parts.items()]
        return "\n  ".join(["PurifiedClassifier(", *lines, *self.extra_repr().split("\n")]) + "\n)"

    def _purify(
        self,
        images: object,
        latents: Tensor | None,
        seeds: Tensor | Sequence[int] | None,
        class_labels: Tensor | Sequence[int] | None,
        progress: OnProgress = None,
        callback: Callable[[Any], Any] | None = None,
    ) -> PurificationResult:
        """A purification outside of inference mode, with gradients where the caller has them on."""
        wanted = torch.is_grad_enabled()  # read before inference mode is left, which turns gradients on
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            unit = self.preprocessing.to_unit(images, self._device())
            chosen = self._seeds(seeds, latents, len(unit))
            if latents is not None:
                latents = self._check_latents(latents, unit)
            n_latents = self.purifier.n_latents if latents is None else latents.shape[1]
            if len(unit) == 0:
                if class_labels is not None:
                    self._labels(class_labels, unit, n_latents)
                return self._empty(unit, n_latents, chosen if latents is None else None)
            small = self.preprocessing.resized(unit, self.image_shape[1:])
            labels = self._labels(class_labels, unit, n_latents)
            compiler = None if getattr(self, "_is_replica", False) else self._compiler  # one of DataParallel is new
            extra = {"predict": self._predicting(small.device, unit.shape[2:]), "compiler": compiler}
            passes = len(small) * self.purifier.passes * n_latents // self.purifier.n_latents
            with showing_passes(passes, "purifying", progress):
                result = self.gradient.purify(self._purification(small, chosen, latents, labels, extra, callback))
            check_purified(result, small, n_latents, f"{type(self.gradient).__name__}.purify")
            flat = self.preprocessing.resized(result.images.flatten(0, 1), unit.shape[2:])
            shown = flat.unflatten(0, result.images.shape[:2])
            return self._with_votes(dataclasses.replace(result, images=shown), self._classify(shown))

    def _purification(
        self,
        images: Tensor,
        seeds: Tensor,
        latents: Tensor | None,
        labels: Tensor | None,
        extra: Mapping[str, Any],
        callback: Callable[[Any], Any] | None,
    ) -> Purification:
        """What the gradient mode is given; of ``extra`` the purifier gets what it names in ``call_options``."""
        options: dict[str, Any] = {
            **{name: extra[name] for name in self.purifier.call_options},
            "seeds": seeds,
            "latents": latents,
            "class_labels": labels,
            "max_parallel": self.max_parallel,
        }
        hooks = (*self._step_hooks, *([] if callback is None else [StepHook(callback)]))
        live = [hook for hook in hooks if hook.live]
        if live and images.requires_grad and torch.is_grad_enabled() and not isinstance(self.gradient, Unrolled):
            raise SettingsError(
                f"A live hook needs a graph through the steps, which {self.gradient!r} does not have. Give the model, "
                "and any attack on it, gradient=Unrolled(), or remove the hook."
            )
        every, prepare, name = together(hooks), None, type(self.purifier).__name__
        n_latents = self.purifier.n_latents if latents is None else latents.shape[1]
        if self.purifier.optimises_latents:
            prepare = getattr(self.purifier, "prepare", None)

        def run() -> PurificationResult:
            with torch.no_grad():
                found = self.purifier(self.backbone, images.detach().clone(), callback=every, **options)
            return check_purified(found, images, n_latents, name)

        def differentiate(backward: Backward) -> PurificationResult:
            given = {"backward": backward, "callback": every, **options}
            return check_purified(
                self.purifier.differentiate(self.backbone, images.clone(), **given), images, n_latents, name
            )

        return Purification(
            images,
            seeds,
            run,
            None if prepare is None else lambda: prepare(self.backbone, images, **options),
            None if prepare is not None else differentiate,
            self.denoiser(labels, recompute=True),
            together([hook for hook in hooks if not hook.live]),
            together(live),
            lambda iteration: any(hook.at(iteration) for hook in live),
            latents if prepare is None and self.purifier.needs is not None else None,
        )

    def _predicting(self, device: torch.device, size: Sequence[int]) -> Predict:
        """The classifier for images [M, C, H, W] of the backbone's size, which it sees in the size of the input."""
        enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

        def predict(images: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=enabled):
                return self._predict(self.preprocessing.resized(images, size)).argmax(dim=1)

        return predict

    def _with_votes(self, result: PurificationResult, logits: Tensor) -> PurificationResult:
        alone = logits.detach()
        votes = count_votes(alone)
        labels = majority_label(alone) if self.vote == "label" else log_mean_probability(alone).argmax(dim=1)
        return dataclasses.replace(result, logits=logits, votes=votes, labels=labels, margin=vote_margin(votes))

    def _empty(self, images: Tensor, n_latents: int, seeds: Tensor | None) -> PurificationResult:
        """The result for no images; one black image, in eval mode, tells how many classes there are."""
        with torch.no_grad(), evaluating(self.classifier):
            logits = self._logits(images.new_zeros((1, *images.shape[1:])))[:0]
        logits = logits + images.sum() if images.requires_grad else logits  # a graph, as for other images
        history = made = None
        if isinstance(self.purifier, CMAP):
            iterations = images.new_zeros((self.settings.iterations, 0))
            history = History(**{field.name: iterations for field in dataclasses.fields(History)})
            made = torch.zeros(0, dtype=torch.int64, device="cpu")
        shown, latents = (images.new_zeros((0, n_latents, *shape)) for shape in (images.shape[1:], self.image_shape))
        conditional = getattr(self.backbone, "num_classes", None) is not None
        labels = torch.zeros((0, n_latents), dtype=torch.int64, device=self._device()) if conditional else None
        return self._with_votes(
            PurificationResult(shown, latents, history, seeds, labels, iterations=made),
            logits[:, None].expand(0, n_latents, logits.shape[1]),
        )


def sampling(model: PurifiedClassifier) -> PurifiedClassifier:
    """The model with its latents at the highest noise level, so that ``generate`` makes samples of the backbone, from
    noise alone.

    Raises:
        WrongKindError: the backbone is a denoiser, which has no one-step samples.
    """
    if model.settings.level is None:
        return model
    return model.variant(settings=model.settings.replace(level=None))


def _other_values(own: Tensor, given: Any) -> bool:
    """Whether a tensor of a state dict has other values than the one in its place; False where nobody can tell."""
    if not isinstance(given, Tensor) or own.is_meta or given.is_meta or own.shape != given.shape:
        return False
    return not torch.equal(given.to(own), own)


def _made(given: Any, option: str, kind: type[Any], examples: str, package: str) -> Any:
    """What was given for an option, an object of a kind or None; raises ``SettingsError``."""
    if given is None or isinstance(given, kind):
        return given
    what = f"not a class: write {given.__name__}()." if isinstance(given, type) else f"but is {given!r}."
    if isinstance(given, str):
        module = importlib.import_module(f"cmap_defense.{package}")
        kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, kind)]
        names = {one.__name__.lower(): one.__name__ for one in kinds if not inspect.isabstract(one)}
        name = names.get(re.sub(r"[^a-z]", "", given.lower()))
        what += f" Did you mean {name}()?" if name else ""
    raise SettingsError(
        f"PurifiedClassifier.{option} must be an object such as {examples} from cmap_defense.{package}, {what}"
    )


def _summary(part: object) -> str:
    """A backbone's name, or else a class or function, and how many parameters it has."""
    named = part if hasattr(part, "__name__") else type(part)
    name = getattr(getattr(part, "record", None), "name", None) or named.__name__  # pyright: ignore[reportAttributeAccessIssue]
    count = sum(weight.numel() for weight in part.parameters()) if isinstance(part, nn.Module) else 0
    return f"{name}, {count:,} parameters" if count else name


def _in_precision(backbone: nn.Module, wanted: torch.dtype | str | None) -> nn.Module:
    """The backbone, or a copy of it in another precision and in the layout that is fastest there."""
    if wanted == "auto":
        wanted = torch.bfloat16 if multiplies_bfloat16(device_of(backbone) or "cpu") else None
    if wanted is None:
        return backbone
    given = wanted
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise SettingsError(
            'PurifiedClassifier.dtype must be "auto", None or a floating-point torch.dtype such as torch.bfloat16, but '
            f"is {given!r}."
        )
    if all(weight.dtype == wanted for weight in weights_of(backbone) if weight.is_floating_point()):
        return backbone
    with building():
        return in_fastest_layout(copy.deepcopy(backbone).to(wanted))
