"""What a purification returns."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, repr=False)
class History:
    """The optimisation, iteration by iteration; entry n is the state before step n.

    All [N, B]; NaN once an image has stopped.

    Attributes:
        l1: the L1 distance of eq. 10, mean over the K latents.
        ssim: the SSIM term of eq. 10, mean over the K latents.
        latent: L_d (12).
        total: L (9).
        latent_mean: mean over all elements of an image's latents; the prior has 0.
        latent_std: standard deviation over all elements of an image's latents; the prior has 1.
    """

    l1: Tensor
    ssim: Tensor
    latent: Tensor
    total: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def __repr__(self) -> str:
        return _shapes(self)


@dataclasses.dataclass(frozen=True, repr=False)
class PurificationResult:
    """K purified versions of each of B images.

    Attributes:
        images: [B, K, C, H, W] in [0, 1], what the classifier is shown (before its normalisation).
        latents: [B, K, C, H, W], the unit latents found.
        history: loss terms and latent moments per iteration; None from a purifier that has no such loop.
        seeds: [B] int64 on the CPU, what the noise was drawn from; None when the caller gave the latents.
        class_labels: [B, K] int64, the class that each latent was generated under; None where the backbone is not
            class-conditional.
        logits: [B, K, classes], the classifier on each purified image.
        votes: [B, classes], how many of the K images are classified so.
        labels: [B], the majority label (eq. 14).
        margin: [B] in [0, 1], the lead of the majority label in shares of the K votes.
        passes: [B] int64, the network passes that each image took, where that depends on the image; None where it is
            what the purifier's ``passes`` says.
        iterations: [B] int64 on the CPU, those that each image made; None from a purifier that has no such loop.

    Logits, votes, labels and margin are None when there was no classifier.
    """

    images: Tensor
    latents: Tensor
    history: History | None = None
    seeds: Tensor | None = None
    class_labels: Tensor | None = None
    logits: Tensor | None = None
    votes: Tensor | None = None
    labels: Tensor | None = None
    margin: Tensor | None = None
    passes: Tensor | None = None
    iterations: Tensor | None = None

    def __repr__(self) -> str:
        return _shapes(self)


def _shapes(result: History | PurificationResult) -> str:
    """The fields of a result with the shapes of tensors in place of their elements, on one line each."""
    shown = []
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        text = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        shown.append(f"  {field.name}: {text}".replace("\n", "\n  "))
    return f"{type(result).__name__}(\n" + "\n".join(shown) + "\n)"
