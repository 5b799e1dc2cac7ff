"""Input validation: every wrong input gets an error that says what was expected, what came, and what to do."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cmap_defense.errors import ClassifierError, DeviceError, InputTypeError, InputValueError

RESIZE_MODES = ("bilinear", "bicubic", "area", "nearest-exact")

TOLERANCE = 1e-4
"""How far outside [0, 1] a value may be, for the rounding of earlier transforms."""


def check_images(images: object, channels: int | None = None) -> Tensor:
    """``images`` when it is a float tensor [B, C, H, W], or an ``InputTypeError`` or ``InputValueError``, with the line
    that converts others to images of so many channels, where these are known."""
    if not isinstance(images, Tensor):
        hint = conversion_line(images, channels)
        raise InputTypeError(f"Images must be a torch.Tensor [B, C, H, W], but are {type(images).__name__}.{hint}")
    if not images.is_floating_point():
        hint = conversion_line(images, channels) or " Convert them to floating-point in [0, 1]."
        raise InputTypeError(f"Images must be floating-point, but are {images.dtype}.{hint}")
    if images.ndim != 4:
        hint = conversion_line(images, channels)
        raise InputValueError(f"Images must be [B, C, H, W], but have {images.ndim} axes: {list(images.shape)}.{hint}")
    return images


def conversion_line(images: object, channels: int | None = None) -> str:
    """A sentence with the line that makes a float tensor [B, C, H, W] in [0, 1] of a PIL image, a numpy array, a
    tensor, or a list of them, which are called ``images`` there; it starts with a space, and is empty where no line is
    known.
    """
    line = _conversion("images", images, channels)
    return "" if line in (None, "images") else f" Convert them: {line}."


def _conversion(name: str, images: object, channels: int | None) -> str | None:
    if isinstance(images, Image.Image):
        return f"{_pil_conversion(name, images, channels)}[None]"
    if isinstance(images, (list, tuple)) and images:
        first = images[0]
        if all(isinstance(image, Image.Image) for image in images):
            return f"torch.stack([{_pil_conversion('image', first, channels)} for image in {name}])"
        if len({(type(image), getattr(image, "shape", None)) for image in images}) > 1:
            return None
        if isinstance(first, np.ndarray) and first.ndim < 4:
            return _conversion(f"numpy.stack({name})", np.stack(images), channels)
        if isinstance(first, Tensor) and first.ndim < 4:
            return _conversion(f"torch.stack({name})", torch.stack(list(images)), channels)
        return None
    if not isinstance(images, (Tensor, np.ndarray)):
        return None
    array = isinstance(images, np.ndarray)
    floating = np.issubdtype(images.dtype, np.floating) if array else images.is_floating_point()
    eight_bit = images.dtype in (np.uint8, torch.uint8)
    axes = _axes(tuple(images.shape), channels, last_first=array)
    if axes is None or not (floating or eight_bit):
        return None
    moved, own = axes
    changed = _CHANNELS.get((own, own if channels is None else channels), None if channels not in (None, own) else "")
    if changed is None:
        return None
    converted = ".float().div(255)" if eight_bit else ".float()" if array else ""
    return f"{f'torch.tensor({name})' if array else name}{moved}{converted}{changed}"


def _pil_conversion(name: str, image: Image.Image, channels: int | None) -> str:
    grey = channels == 1 if channels is not None else image.mode in ("1", "L")
    return f"torchvision.transforms.functional.to_tensor({name}.convert({'L' if grey else 'RGB'!r}))"


def _axes(shape: tuple[int, ...], channels: int | None, *, last_first: bool) -> tuple[str, int] | None:
    """What brings the axes of images of this shape into order, and how many channels there are then."""
    if len(shape) == 2:
        return "[None, None]", 1
    if len(shape) not in (3, 4):
        return None
    single = len(shape) == 3
    places = {
        "first": ("[None]" if single else "", shape[-3]),
        "last": (".permute(2, 0, 1)[None]" if single else ".permute(0, 3, 1, 2)", shape[-1]),
    }
    order = ("last", "first") if last_first else ("first", "last")
    for fitting in ((channels,), (1, 3, 4)):
        for place in order:
            if places[place][1] in fitting:
                return places[place]
    return ("[:, None]", 1) if single and channels == 1 else None


_CHANNELS = {
    (1, 3): ".expand(-1, 3, -1, -1)",
    (3, 1): ".mean(dim=1, keepdim=True)",
    (4, 1): "[:, :3].mean(dim=1, keepdim=True)",
    (4, 3): "[:, :3]",
}
"""What makes images [B, C, H, W] of so many channels ones of so many others."""


def check_finite(images: Tensor) -> None:
    """Raises ``InputValueError`` when there are NaN or infinite values; it names the images of the batch."""
    finite = torch.isfinite(images.detach()).flatten(1).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise InputValueError(f"Images must be finite, but NaN or inf are in these of the batch: {_some(bad)}.")


def check_unit_range(images: Tensor) -> None:
    """Raises ``InputValueError`` when values lie outside [0, 1] by more than 1e-4."""
    found = range_outside(images)
    if found is not None:
        raise InputValueError(
            f"Images must lie in [0, 1], but lie in {range_text(found)}. "
            f"{eight_bit_hint(found) or 'They look normalised: undo that first, images * std + mean.'}"
        )


def range_outside(images: Tensor, slack: float = 0.0) -> tuple[float, float] | None:
    """The smallest and the largest value, when one lies outside [0, 1] by more than 1e-4 plus ``slack``; or None."""
    if images.numel() == 0:
        return None
    low, high = (v.item() for v in images.detach().aminmax())
    return None if low >= -TOLERANCE - slack and high <= 1 + TOLERANCE + slack else (low, high)


def range_text(found: tuple[float, float]) -> str:
    """A range as errors show it."""
    return f"[{found[0]:.4g}, {found[1]:.4g}]"


def eight_bit_hint(found: tuple[float, float]) -> str:
    """What to do where a range looks like that of 8-bit values, or nothing."""
    low, high = found
    return "They look like 8-bit values: divide by 255 first." if high > 20 or (high > 2 and low >= 0) else ""


def clamp_straight_through(images: Tensor, slack: float | None = None) -> Tensor:
    """Images [B, C, H, W] clamped to [0, 1], with a gradient as if they were not; with ``slack`` only those that have a
    value farther than 1e-4 plus this outside."""
    clamped = images.detach().clamp(0, 1) + (images - images.detach())
    if slack is None:
        return clamped
    margin = TOLERANCE + slack
    outside = ((images < -margin) | (images > 1 + margin)).flatten(1).any(dim=1)
    return torch.where(outside[:, None, None, None], clamped, images)


def check_shape(images: Tensor, image_shape: Sequence[int], *, resizes: bool) -> None:
    """Raises ``InputValueError`` when channels, or height and width (unless ``resizes``), do not fit."""
    channels, height, width = image_shape
    if images.shape[1] != channels:
        raise InputValueError(
            f"The backbone makes images with {channels} channel(s), but these have {images.shape[1]}: "
            f"{list(images.shape)}." + conversion_line(images, channels)
        )
    if not resizes and tuple(images.shape[2:]) != (height, width):
        raise InputValueError(
            f"The backbone makes {height} x {width} images, but these are {images.shape[2]} x {images.shape[3]}. "
            'Use a backbone of that size, or PurifiedClassifier(..., resize="bilinear") to resize there and back.'
        )
    if resizes and 0 in images.shape[2:]:
        raise InputValueError(f"Images must have a height and a width, but are {list(images.shape)}.")


def check_device(images: Tensor, device: torch.device | None) -> None:
    """Raises ``DeviceError`` when the images are not where the model is; None means anywhere."""
    if device is not None and images.device != device:
        raise DeviceError(
            f"The model is on {device}, but the images are on {images.device}. "
            f"Move one of them: images.to({str(device)!r})."
        )


def check_seeds(seeds: object, count: int, name: str = "seeds") -> Tensor:
    """Seeds as int64 [count] on the CPU, from a tensor or a sequence of integers. Raises ``InputTypeError`` for others,
    and ``InputValueError`` unless there is one per image."""
    if not isinstance(seeds, Tensor):
        listed = seeds.tolist() if isinstance(seeds, np.ndarray) else seeds
        if not isinstance(listed, Sequence) or any(
            isinstance(s, bool) or not isinstance(s, numbers.Integral) for s in listed
        ):
            raise InputTypeError(
                f"{name} must be an integer tensor [B] or a list of integers, but are {seeds!r}."
                + (" For one seed for all images use PurifiedClassifier(..., seed=...)." if name == "seeds" else "")
            )
        if any(not -(2**63) <= int(s) < 2**64 for s in listed):
            raise InputValueError(f"{name} must fit 64 bits, but are {listed!r}.")
        seeds = torch.tensor([signed_word(int(s)) for s in listed], dtype=torch.int64, device="cpu")
    if not _is_integer(seeds):
        raise InputTypeError(f"{name} must be integers, but are {seeds.dtype}.")
    if tuple(seeds.shape) != (count,):
        raise InputValueError(f"{name} must be one per image, [{count}], but are {list(seeds.shape)}.")
    return seeds.detach().to("cpu", torch.int64)


def check_indices(indices: object, count: int) -> Tensor:
    """Positions of images in their data set as int64 [count] on the CPU; 0, 1, ... for None. See ``check_seeds``."""
    return torch.arange(count, device="cpu") if indices is None else check_seeds(indices, count, "indices")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_class_labels(labels: object, count: int, num_classes: int | None, *, ranged: bool = True) -> Tensor | None:
    """Labels int64 [count] for a model of ``num_classes`` classes; None for one that is not class-conditional (None).

    Without ``ranged`` a CUDA device is spared the wait for the comparison with 0 and num_classes, in a loop. Raises
    ``InputTypeError`` for what is no integer tensor, and ``InputValueError`` for labels that are missing or not wanted,
    not one per image, or out of range.
    """
    if num_classes is None:
        if labels is not None:
            raise InputValueError("class_labels were given, but the backbone is not class-conditional: leave them out.")
        return None
    if labels is None:
        raise InputValueError(
            f"This backbone is class-conditional: give class_labels, integers [{count}] from 0 to {num_classes - 1}."
        )
    if not isinstance(labels, Tensor) or not _is_integer(labels):
        came = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InputTypeError(f"class_labels must be an integer tensor [{count}], but are {came}.")
    if tuple(labels.shape) != (count,):
        raise InputValueError(f"class_labels must be one per image, [{count}], but are {list(labels.shape)}.")
    labels = labels.to(torch.int64)
    if labels.device.type == "cuda" and not ranged:
        return labels
    if count and not bool(((labels >= 0) & (labels < num_classes)).all()):
        low, high = (n.item() for n in labels.aminmax())
        raise InputValueError(f"class_labels must lie in 0 .. {num_classes - 1}, but lie in {low} .. {high}.")
    return labels


def check_logits(logits: object, count: int) -> Tensor:
    """A classifier's logits [count, classes], float32 at least. Raises ``ClassifierError`` for another shape or dtype,
    fewer than 2 classes, NaN, +inf, or a row of nothing but -inf."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ClassifierError(
            f"The classifier must return logits [{count}, classes] of 2 classes at least, but returned {came}."
            + _way_to_logits(logits, count)
        )
    if not logits.is_floating_point():
        raise ClassifierError(f"The classifier must return floating-point logits, but returned {logits.dtype}.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if torch.isnan(logits.detach()).any() or torch.isposinf(logits.detach()).any():
        raise ClassifierError(
            "The classifier returned logits that are NaN or +inf. See whether its weights are finite and loaded, and "
            "use float32 or bfloat16 where float16 overflows."
        )
    if torch.isneginf(logits.detach()).all(dim=1).any():
        raise ClassifierError(
            "The classifier returned -inf for every class of an image. Leave one class finite, at least."
        )
    return logits


def _way_to_logits(outputs: object, count: int) -> str:
    """How to make logits of these outputs; empty where that is not known."""
    if isinstance(outputs, Tensor):
        return _two_classes(outputs) if outputs.shape in ((count,), (count, 1)) else ""
    if isinstance(outputs, Mapping) or hasattr(outputs, "logits"):
        return " Take the logits out of it, such as lambda images: classifier(images)['logits']."
    if isinstance(outputs, (tuple, list)):
        return " Take the logits out of it, such as lambda images: classifier(images)[0]."
    return ""


def _two_classes(logits: Tensor) -> str:
    """How to make two logits of one, [count] or [count, 1]: their softmax is the sigmoid."""
    first = "" if logits.ndim == 2 else "nn.Unflatten(0, (-1, 1)), "
    return (
        " For one logit, whose sigmoid is the probability of class 1, put a 0 before it: "
        f"nn.Sequential(classifier, {first}nn.ConstantPad1d((1, 0), 0.0)), without the sigmoid."
    )


def signed_word(seed: int) -> int:
    """Any integer modulo 2^64 as a signed 64-bit one."""
    return (seed + 2**63) % 2**64 - 2**63


def resize_images(images: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Images [B, C, H, W] in [0, 1] resized to ``size`` (height, width), differentiably; those of that size as they
    are.

    Of the ``RESIZE_MODES`` "bilinear" and "bicubic" are antialiased.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    smooth = mode in ("bilinear", "bicubic")
    resized = F.interpolate(images, tuple(size), mode=mode, align_corners=False if smooth else None, antialias=smooth)
    return resized.clamp(0, 1) if mode == "bicubic" else resized


def _some(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:5]))
    return shown if len(indices) <= 5 else f"{shown} and {len(indices) - 5} more"


def usable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd accepts of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
