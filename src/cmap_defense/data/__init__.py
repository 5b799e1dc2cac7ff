"""Data sets, in memory or read on selection, and image files on disk."""

from cmap_defense.data.files import read_image, write_image
from cmap_defense.data.folders import FolderImages
from cmap_defense.data.images import ImageSource, LabelledImages
from cmap_defense.data.sources import DATASETS, load_dataset, open_dataset

__all__ = [
    "DATASETS",
    "FolderImages",
    "ImageSource",
    "LabelledImages",
    "load_dataset",
    "open_dataset",
    "read_image",
    "write_image",
]
