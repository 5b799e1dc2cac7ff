"""The method itself: settings, losses (eq. 10, 12, 9), the latent loop (algorithm 1) and the vote (eq. 14)."""

from typing import TYPE_CHECKING

from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.common.optional import lazy_names

if TYPE_CHECKING:
    from cmap_defense.cmap.losses import ObjectiveTerms, latent_moments, latent_term, perceptual_terms
    from cmap_defense.cmap.optimise import LatentState, optimise_latents
    from cmap_defense.cmap.ssim import SSIMReference
    from cmap_defense.cmap.voting import count_votes, log_mean_probability, majority_label, vote_logits, vote_margin

__all__ = [
    "CMAPSettings",
    "LatentState",
    "ObjectiveTerms",
    "SSIMReference",
    "count_votes",
    "latent_moments",
    "latent_term",
    "log_mean_probability",
    "majority_label",
    "optimise_latents",
    "perceptual_terms",
    "vote_logits",
    "vote_margin",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, __all__, ".losses", ".optimise", ".ssim", ".voting")
