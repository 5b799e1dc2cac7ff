"""What options can be chosen from, and what they are when nothing is said, where the code behind imports torch.

The help of a command is shown without torch; a test compares these with what the package has.
"""

from __future__ import annotations

__all__ = [
    "ATTACK_SETS",
    "COUNT",
    "DATASETS",
    "EMBEDDED",
    "NETWORKS",
    "OBJECTIVES",
    "PRESETS",
    "QUALITY_SAMPLES",
    "RESIZE_MODES",
    "STUDIES",
    "WEIGHTS_DTYPES",
]

EMBEDDED = "embedded"
"""The name of what ships with the package."""

COUNT = 512
"""Images that commands take from a data set where they are not told how many."""

ATTACK_SETS = ("standard", "paper", "full")
DATASETS = ("cifar10", "fashion-mnist")
NETWORKS = ("compact", "ncsnpp", "imagenet64")
OBJECTIVES = ("edm", "ct", "ict", "ect", "cd")
PRESETS = ("small", "cifar10")
QUALITY_SAMPLES = 5000
RESIZE_MODES = ("bilinear", "bicubic", "area", "nearest-exact")
STUDIES = ("beta", "eps", "latent-weight", "latents", "ssim-weight", "surrogate", "trajectory", "vote")
WEIGHTS_DTYPES = ("float32", "bfloat16", "float16")
