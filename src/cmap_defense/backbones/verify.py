"""Check that a backbone is what it should be, and note the commit and checksum that were found."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones import diffusers
from cmap_defense.backbones.folder import RECORD_FILE, read_backbone, read_record
from cmap_defense.backbones.karras import ConsistencyBackbone, KarrasModel
from cmap_defense.backbones.load import entry_of, resolve_backbone, with_remedy
from cmap_defense.backbones.registry.entry import HubRepository, OfficialFile
from cmap_defense.backbones.remote.cache import pin, pinned
from cmap_defense.backbones.remote.card import hub_card
from cmap_defense.backbones.remote.fetch import fetch_entry
from cmap_defense.backbones.remote.hub import push_files
from cmap_defense.backbones.weights import sha256_of_weights
from cmap_defense.errors import BackboneFileError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found when a backbone was verified.

    Attributes:
        source: what was verified.
        folder: where it is.
        weights_sha256: of the weights there.
        revision: the Hub's commit, where it came from there.
        official_sha256: of the official file that was converted.
        boundary_error: the largest |f(x, sigma_min) - x|, 0 for the paper's boundary condition; None for a denoiser.
        image_mean: over 4 generated (or denoised) images in [-1, 1], some 0 for photographs.
        image_std: over the same, some 0.5 for photographs.
        pinned: the file in which the commit and checksum were noted; None for what has no name.
    """

    source: str
    folder: Path
    weights_sha256: str
    revision: str | None
    official_sha256: str | None
    boundary_error: float | None
    image_mean: float
    image_std: float
    pinned: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = dataclasses.asdict(self)
        return values | {name: str(values[name]) for name in ("folder", "pinned") if values[name] is not None}


def verify_backbone(source: str | os.PathLike[str], *, remember: bool = True) -> Verification:
    """Load a backbone, check its checksums, that f(x, sigma_min) = x and that it generates, and note what was found.

    From then on the name stands for that commit and checksum on this machine, and anything else is refused.

    Args:
        source: a name, a folder or a Hub id, as for ``load_backbone``.
        remember: whether to note the commit and checksum of a name.

    Returns:
        What was found.

    Raises:
        BackboneFileError: a file is damaged, is not the one that was recorded, or is not a working model.
        UnknownNameError: no such name or repository.
    """
    entry = entry_of(source)
    if entry is None:
        folder, origin = resolve_backbone(source), None
    else:
        folder, origin = fetch_entry(pinned(entry))
    record = read_record(folder)
    with with_remedy(entry):
        model = read_backbone(folder)
    boundary, images = _boundary_error_and_images(model)
    allowed = getattr(model.network, "boundary_error", 0.0)
    if not bool(torch.isfinite(images).all()) or (boundary is not None and not math.isfinite(boundary)):
        raise BackboneFileError(f"{folder} is no working model: it makes NaN or infinite values.")
    if boundary is not None and boundary > allowed:
        raise BackboneFileError(f"{folder} is no consistency model: |f(x, sigma_min) - x| is {boundary:.3g}.")
    weights = sha256_of_weights(folder / record.weights_file)
    revision = folder.name if folder.parent.name == "snapshots" else None
    official = record.source.get("sha256")
    note = None
    if entry is not None and remember:
        if isinstance(origin, HubRepository) and revision is not None:
            note = pin(entry.name, origin, revision=revision, sha256=weights)
        elif isinstance(origin, OfficialFile) and official is not None:
            note = pin(entry.name, origin, sha256=official)
    return Verification(
        source=os.fspath(source),
        folder=folder,
        weights_sha256=weights,
        revision=revision,
        official_sha256=official,
        boundary_error=boundary,
        image_mean=images.mean().item(),
        image_std=images.std().item(),
        pinned=note,
    )


def _boundary_error_and_images(model: KarrasModel) -> tuple[float | None, Tensor]:
    """The largest |f(x, sigma_min) - x|, and 4 images: of the generator, or of one denoising from half the range."""
    noise = torch.randn((4, *model.image_shape), generator=torch.Generator().manual_seed(0))
    labels = None if model.num_classes is None else torch.arange(4) % model.num_classes
    with torch.no_grad():
        if not isinstance(model, ConsistencyBackbone):
            return None, model.denoise(model.noise.sigma_max / 2 * noise, model.noise.sigma_max / 2, labels)
        at_rest = model.denoise(noise, model.noise.sigma_min, labels)
        return (at_rest - noise).abs().max().item(), model.generate(noise, labels)


CARD = "README.md"


def push_backbone(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, message: str = "Add the backbone"
) -> str:
    """Upload a backbone folder: record, weights, the pipeline's configurations where it is one, licences, model card.

    The folder is verified first. Its own README.md is taken as the card where there is one; otherwise the card is made
    from the record.

    Args:
        folder: written by ``train``, ``convert`` or ``write_backbone``.
        repo_id: organisation/name; the repository is made when it is not there. The token is HF_TOKEN's, or that of
            ``hf auth login``.
        private: whether a repository that is made here is private.
        message: of the commit.

    Returns:
        ``organisation/name@commit``, which ``load_backbone`` takes.

    Raises:
        BackboneFileError: the folder is not whole, or the Hub cannot be reached.
        UnknownNameError: no right to write there.
    """
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        raise BackboneFileError(f"{folder} has no {RECORD_FILE}: push takes a folder that convert or train wrote.")
    verify_backbone(folder, remember=False)
    record = read_record(folder)
    names = [record.weights_file, *diffusers.PIPELINE_FILES, CARD]
    names += sorted(path.name for path in folder.iterdir() if path.name.upper().startswith(("LICENSE", "NOTICE")))
    files: dict[str, Path | bytes] = {name: folder / name for name in names if (folder / name).is_file()}
    files.setdefault(CARD, hub_card(record, repo_id).encode())
    files[RECORD_FILE] = folder / RECORD_FILE
    return f"{repo_id}@{push_files(repo_id, files, private=private, message=message)}"
