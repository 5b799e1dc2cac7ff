"""Detection of adversarial images: how far attacked, generated and purified images lie from clean ones."""

from cmap_defense.common.statistics import AUROC
from cmap_defense.detection.deep import DeepKernel, DeepKernelSettings, deep_kernel, mmd_ratio, train_deep_kernel
from cmap_defense.detection.detect import KINDS, Detection, KindSummary, detect
from cmap_defense.detection.eps import EPS, vp_sigmas
from cmap_defense.detection.mmd import Gaussian, Kernel, mmd_distances, squared_distances, unbiased_mmd2

__all__ = [
    "AUROC",
    "EPS",
    "KINDS",
    "DeepKernel",
    "DeepKernelSettings",
    "Detection",
    "Gaussian",
    "Kernel",
    "KindSummary",
    "deep_kernel",
    "detect",
    "mmd_distances",
    "mmd_ratio",
    "squared_distances",
    "train_deep_kernel",
    "unbiased_mmd2",
    "vp_sigmas",
]
