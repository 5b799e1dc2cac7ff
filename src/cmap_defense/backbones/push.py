"""A backbone folder to the Hub, with its model card."""

from __future__ import annotations

import os
from pathlib import Path

from cmap_defense.backbones import diffusers
from cmap_defense.backbones.folder import RECORD_FILE, read_record
from cmap_defense.backbones.remote.card import hub_card
from cmap_defense.backbones.remote.hub import push_files
from cmap_defense.backbones.verify import verify_backbone
from cmap_defense.errors import BackboneFileError

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
