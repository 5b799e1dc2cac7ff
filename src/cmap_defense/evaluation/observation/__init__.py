"""The observation of Fig. 1: how far attacked, generated and purified images lie from clean ones, by EPS and MMD."""

from cmap_defense.evaluation.observation.auroc import AUROC
from cmap_defense.evaluation.observation.deep import (
    DeepKernel,
    DeepKernelSettings,
    deep_kernel,
    mmd_ratio,
    train_deep_kernel,
)
from cmap_defense.evaluation.observation.eps import EPS, vp_sigmas
from cmap_defense.evaluation.observation.mmd import Gaussian, Kernel, mmd_distances, squared_distances, unbiased_mmd2
from cmap_defense.evaluation.observation.observe import KINDS, KindSummary, Observation, observe

__all__ = [
    "AUROC",
    "EPS",
    "KINDS",
    "DeepKernel",
    "DeepKernelSettings",
    "Gaussian",
    "Kernel",
    "KindSummary",
    "Observation",
    "deep_kernel",
    "mmd_distances",
    "mmd_ratio",
    "observe",
    "squared_distances",
    "train_deep_kernel",
    "unbiased_mmd2",
    "vp_sigmas",
]
