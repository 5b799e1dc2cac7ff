"""How good a backbone is: samples beside real images, purified images beside their originals."""

from cmap_defense.evaluation.quality.compare import Frechet, InceptionDistance, SampleComparison, SampleFigures
from cmap_defense.evaluation.quality.features import FeatureLayer, find_features, read_features
from cmap_defense.evaluation.quality.frechet import frechet_distance, gaussian_distance
from cmap_defense.evaluation.quality.inception import inception_features, inception_file
from cmap_defense.evaluation.quality.reconstruct import Judged, Reconstructions, reconstruct
from cmap_defense.evaluation.quality.run import Quality, QualityRun
from cmap_defense.evaluation.quality.samples import sample_images

__all__ = [
    "FeatureLayer",
    "Frechet",
    "InceptionDistance",
    "Judged",
    "Quality",
    "QualityRun",
    "Reconstructions",
    "SampleComparison",
    "SampleFigures",
    "find_features",
    "frechet_distance",
    "gaussian_distance",
    "inception_features",
    "inception_file",
    "read_features",
    "reconstruct",
    "sample_images",
]
