"""Data sets in memory and image files on disk."""

from cmap_defense.data.files import read_image, write_image
from cmap_defense.data.sources import DATASETS, LabelledImages, load_dataset

__all__ = ["DATASETS", "LabelledImages", "load_dataset", "read_image", "write_image"]
