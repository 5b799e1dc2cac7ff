"""Data sets, in memory or read when they are needed, the selection of images, and image files on disk."""

from typing import TYPE_CHECKING

from cmap_defense.common.optional import lazy_names
from cmap_defense.data.subset import Subset

if TYPE_CHECKING:
    from cmap_defense.data.files import read_image, write_image
    from cmap_defense.data.folders import FolderImages
    from cmap_defense.data.images import ImageSource, LabelledImages
    from cmap_defense.data.selection import SelectedImages
    from cmap_defense.data.sources import DATASETS, load_dataset, open_dataset

__all__ = [
    "DATASETS",
    "FolderImages",
    "ImageSource",
    "LabelledImages",
    "SelectedImages",
    "Subset",
    "load_dataset",
    "open_dataset",
    "read_image",
    "write_image",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, __all__, ".files", ".images", ".folders", ".sources", ".selection")
