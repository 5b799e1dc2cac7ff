"""Every error this package raises on purpose.

All derive from ``CmapError`` and from the builtin that a caller would catch without knowing the package.
Messages say what was expected, what came, and what to do.
"""

from __future__ import annotations

__all__ = [
    "AttackError",
    "BackboneError",
    "BackboneFileError",
    "BackboneWarning",
    "CheckpointError",
    "CheckpointWarning",
    "ClassifierError",
    "ClassifierWarning",
    "CmapError",
    "CompileWarning",
    "DataError",
    "DeviceError",
    "EvaluationError",
    "GradientError",
    "GradientWarning",
    "InputRangeWarning",
    "InputTypeError",
    "InputValueError",
    "MissingExtraError",
    "NoLatentsError",
    "OptionError",
    "PurifierError",
    "SettingsError",
    "TrainingError",
    "UnknownNameError",
    "WrongKindError",
]


class CmapError(Exception):
    """Base class of all errors of this package."""


class SettingsError(CmapError, ValueError):
    """A setting is missing, unknown, of the wrong type or out of its range."""


class NoLatentsError(SettingsError, AttributeError):
    """The model has no ``settings``, since its purifier is no optimisation over latents."""


class OptionError(CmapError, TypeError):
    """A constructor has no option of that name; the message says which object has it, or which name is near."""


class InputValueError(CmapError, ValueError):
    """Images, latents or seeds have a wrong shape, size or value."""


class InputTypeError(CmapError, TypeError):
    """Images, latents or seeds have a wrong type or dtype."""


class DeviceError(CmapError, RuntimeError):
    """A tensor is on another device than the model."""


class ClassifierError(CmapError, ValueError):
    """The wrapped classifier returned something that is not a [B, classes] tensor of finite logits."""


class ClassifierWarning(UserWarning):
    """A classifier is in training mode where nothing is trained, returns probabilities, or is adapted to another
    purifier."""


class PurifierError(CmapError, ValueError):
    """A purifier returned something else than its purified images, declares something that is not valid, or cannot be
    called as one."""


class AttackError(CmapError, ValueError):
    """The search of an attack returned something else than candidates, or a loss something else than a number for each
    image."""


class BackboneError(CmapError, TypeError):
    """An object does not satisfy the backbone protocol, or one of its methods broke its promise."""

    @classmethod
    def without_graph(cls, what: str) -> BackboneError:
        """Images do not depend for autograd on what they were made from: "latents" or "noisy images"."""
        return cls(
            f"The backbone returned images that do not depend on the {what} for autograd. Remove torch.no_grad, "
            "torch.inference_mode and detach from it."
        )


class WrongKindError(BackboneError):
    """A backbone is a denoiser where a consistency model is needed, or the other way round."""


class BackboneFileError(CmapError, OSError):
    """A backbone folder is missing, incomplete, truncated or written by something else."""


class MissingExtraError(CmapError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class UnknownNameError(CmapError, LookupError):
    """A name is in no registry; the message lists near matches."""


class CheckpointWarning(UserWarning):
    """A checkpoint of a training is damaged or incomplete, so that the training goes on from another one or begins."""


class BackboneWarning(UserWarning):
    """A state dict has other weights of the backbone than the backbone that it is loaded into."""


class CompileWarning(UserWarning):
    """torch.compile failed, or what it made has other results; the loop runs without it."""


class GradientError(CmapError, RuntimeError):
    """A gradient is needed that the chosen gradient mode cannot give."""


class GradientWarning(UserWarning):
    """A gradient was zero wherever an attack looked, so that the attack did nothing."""


class InputRangeWarning(UserWarning):
    """Images lay outside [0, 1] and were clamped."""


class DataError(CmapError, ValueError):
    """A data set or an image file cannot be read or does not fit."""


class EvaluationError(CmapError, RuntimeError):
    """An evaluation's folder is in use, belongs to other settings, or is not finished."""


class CheckpointError(CmapError, RuntimeError):
    """A training's folder is in use, or holds a checkpoint that does not belong to the settings given."""


class TrainingError(CmapError, RuntimeError):
    """A training cannot go on: its loss is infinite or no number."""

    @classmethod
    def diverged(cls, what: str) -> TrainingError:
        """From what is not finite, as the beginning of a sentence."""
        return cls(
            f"{what}: the training has diverged, and no checkpoint of it is written. Start again in another folder "
            "with a lower learning rate, a longer warm-up, or float32."
        )
