"""From the classifier's logits on K generated images to one prediction: eq. 14 of arXiv 2412.08394."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIFT = 1e-3
"""How far above the rest the majority label's logit is lifted where it is not on top."""

LOWEST = -1e30
"""Log-probabilities stay above this, so that all is finite where a classifier masks classes with -inf."""


def count_votes(logits: Tensor) -> Tensor:
    """[B, classes] int64 votes from logits [B, K, classes]: one per latent, for its top class, the lower on ties."""
    top = logits.argmax(dim=-1)
    return torch.zeros(logits.shape[0], logits.shape[2], dtype=torch.int64, device=logits.device).scatter_add_(
        1, top, torch.ones_like(top)
    )


def log_mean_probability(logits: Tensor) -> Tensor:
    """log (1/K) sum_k softmax(logits_k), [B, classes] from [B, K, classes]; finite, float32 at least.

    Added up in the order of size, so that it is exactly the same for every order of the K latents.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(dim=-1).clamp_min(LOWEST).sort(dim=1).values.logsumexp(dim=1) - math.log(
        logits.shape[1]
    )


def majority_label(logits: Tensor) -> Tensor:
    """y of eq. 14, [B] int64: most votes; on ties the higher mean probability, then the lower index.

    Exactly the same for every order of the K latents: probabilities are added up in the order of their size.
    """
    votes = count_votes(logits)
    probability = logits.detach().double().softmax(dim=-1).sort(dim=1).values.sum(dim=1)
    leading = votes == votes.max(dim=1, keepdim=True).values
    return torch.where(leading, probability, -1.0).argmax(dim=1)


def nearest_voter(images: Tensor, versions: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """[B] int64 in [0, K), the purified image to show of each: the nearest in L1 of those that agree with the vote.

    Args:
        images: [B, C, H, W], what was purified.
        versions: [B, K, C, H, W], purified.
        logits: [B, K, classes] of the purified images.
        labels: [B], what the vote says. Where none of the K is classified so, which a soft vote allows, it is the
            nearest of all.
    """
    distance = (versions - images[:, None]).abs().flatten(2).mean(dim=2)
    agrees = logits.argmax(dim=-1) == labels[:, None]
    return torch.where(agrees | ~agrees.any(dim=1, keepdim=True), distance, torch.inf).argmin(dim=1)


def vote_margin(votes: Tensor) -> Tensor:
    """[B] in [0, 1]: the lead of the first class over the second as a share of the votes [B, classes]."""
    if votes.shape[1] == 1:
        return torch.ones(len(votes), dtype=torch.float32, device=votes.device)
    first, second = votes.topk(2, dim=1).values.unbind(dim=1)
    return (first - second).float() / votes.sum(dim=1)


def vote_logits(logits: Tensor, *, lift: bool = True) -> Tensor:
    """The wrapper's prediction: the log mean probability [B, classes], its argmax being the vote.

    Where the majority label is not on top already, it is lifted just above the rest by a constant that carries no
    gradient.

    Args:
        logits: [B, K, classes].
        lift: False leaves the log mean probability as it is (the soft vote).
    """
    soft = log_mean_probability(logits)
    if not lift or soft.numel() == 0:
        return soft
    label = majority_label(logits)[:, None]
    values = soft.detach()
    own = values.gather(1, label)
    best_other = values.scatter(1, label, -torch.inf).max(dim=1, keepdim=True).values
    missing = torch.where(own > best_other, 0.0, best_other - own + LIFT)
    return soft + torch.zeros_like(values).scatter(1, label, missing)
