"""Which class each latent of a class-conditional backbone is generated under.

A class-conditional model draws images of one class. Nobody knows the class of the image that is to be purified, so
every choice is a guess, and the guess decides: the label that the classifier gives to an attacked image is the label
that the attacker wanted, and the generator is then conditioned on a wrong class. Compare the choices before you rely
on one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmap_defense.common.inputs import check_class_labels
from cmap_defense.errors import ClassifierError, InputTypeError, InputValueError, SettingsError

ClassLabels = str | Callable[[Tensor], Tensor]
"""How to choose: "predicted", "spread", or a function of the images."""

CHOICES = ("predicted", "spread")


def require_class_labels(value: object) -> ClassLabels:
    """``value`` when it is a way to choose. Raises ``SettingsError``."""
    if callable(value) or (isinstance(value, str) and value in CHOICES):
        return value  # pyright: ignore[reportReturnType]
    raise SettingsError(
        'PurifiedClassifier.class_labels must be "predicted", "spread" or a function images -> labels, '
        f"but is {value!r}. Labels of single images are given to the call: model(images, class_labels=...)."
    )


def choose_class_labels(
    choice: ClassLabels,
    given: object,
    images: Tensor,
    classify: Callable[[Tensor], Tensor],
    *,
    n_latents: int,
    num_classes: int | None,
) -> Tensor | None:
    """Labels [B, K] for every latent of every image; None for a backbone that is not class-conditional.

    Args:
        choice: "predicted": the classifier's top label on the input, for all K. "spread": the classifier's K most
            likely labels, one per latent, from the top again where there are fewer. A function: maps the images to
            labels [B] or [B, K].
        given: labels [B] or [B, K] that somebody knows; they win over ``choice``.
        images: [B, C, H, W] in [0, 1].
        classify: images to logits [B, classes].
        n_latents: K.
        num_classes: of the backbone.

    Raises:
        ClassifierError: the classifier's classes are not the backbone's, so that its labels mean nothing to it.
        InputTypeError, InputValueError: labels that do not fit.
    """
    if num_classes is None:
        check_class_labels(given, len(images), None)
        return None
    if given is not None or callable(choice):
        with torch.no_grad():
            labels = choice(images.detach()) if given is None and callable(choice) else given
        return _one_per_latent(labels, images, n_latents, num_classes)
    with torch.no_grad():
        logits = classify(images.detach())
    if logits.shape[1] != num_classes:
        raise ClassifierError(
            f"The classifier has {logits.shape[1]} classes and the backbone is conditioned on {num_classes}, so a "
            "predicted label means nothing to the backbone. Give PurifiedClassifier(..., class_labels=function) that "
            "maps images to the backbone's labels, or model(images, class_labels=...)."
        )
    if choice == "predicted":
        return logits.argmax(dim=1)[:, None].expand(-1, n_latents)
    ranked = logits.topk(min(n_latents, num_classes), dim=1).indices
    places = torch.arange(n_latents, device=ranked.device) % ranked.shape[1]
    return ranked[:, places]


def _one_per_latent(given: object, images: Tensor, n_latents: int, num_classes: int) -> Tensor:
    count = len(images)
    if not isinstance(given, Tensor):
        try:
            given = torch.as_tensor(given, dtype=torch.int64 if count == 0 else None, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputTypeError(
                f"class_labels must be integers [{count}] or [{count}, K], but are {given!r}."
            ) from error
    labels = given.to(images.device)
    if labels.ndim == 1 and len(labels) == count:
        labels = labels[:, None].expand(-1, n_latents)
    if tuple(labels.shape) != (count, n_latents):
        raise InputValueError(
            f"class_labels must be [{count}] or [{count}, {n_latents}], one per image or one per latent, "
            f"but are {list(given.shape)}."
        )
    checked = check_class_labels(labels.reshape(-1), count * n_latents, num_classes)
    assert checked is not None
    return checked.view(count, n_latents)
