"""Backbone folders from the Hugging Face Hub: huggingface_hub does the work, this translates its errors."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cmap_defense.errors import BackboneFileError, UnknownNameError

__all__ = ["fetch_folder"]

_CLIENT_ERROR: type[Exception] = getattr(huggingface_hub.errors, "HTTPError", OSError)
"""What the Hub's HTTP client raises for broken connections; before version 1 of huggingface_hub, an OSError."""


def fetch_folder(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The local copy of a Hub repository's files that match ``patterns``; from the cache when the Hub is out of reach.

    Raises:
        UnknownNameError: no such repository or revision, or no access to it.
        BackboneFileError: the Hub cannot be reached and the cache does not hold the files.
    """
    shown = f"{repo_id}@{revision}" if revision else repo_id
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UnknownNameError(
            f"{shown} is gated: accept its terms on the Hub, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise UnknownNameError(f"The Hub's {repo_id} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownNameError(
            f"There is no folder and no Hub repository {shown!r} that you may read. "
            "If it is private, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, _CLIENT_ERROR, OSError) as error:
        raise BackboneFileError(
            f"{shown} is not in the local cache and could not be fetched ({type(error).__name__}: {error}). "
            "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder."
        ) from error
