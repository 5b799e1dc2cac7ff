"""How good a backbone is: samples beside real images, purified images beside their originals."""

from cmap_defense.quality.compare import SampleComparison, sample_images
from cmap_defense.quality.features import find_features, inception_features, inception_file, read_features
from cmap_defense.quality.frechet import frechet_distance, gaussian_distance
from cmap_defense.quality.reconstruct import Reconstructions, reconstruct
from cmap_defense.quality.run import Quality, QualityRun

__all__ = [
    "Quality",
    "QualityRun",
    "Reconstructions",
    "SampleComparison",
    "find_features",
    "frechet_distance",
    "gaussian_distance",
    "inception_features",
    "inception_file",
    "read_features",
    "reconstruct",
    "sample_images",
]
