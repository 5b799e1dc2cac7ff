"""Files from and to the Hub, and from official servers: huggingface_hub does the work, this translates its errors."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
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
from huggingface_hub.file_download import http_get

from cmap_defense.common.paths import home
from cmap_defense.errors import BackboneFileError, UnknownNameError

_CLIENT_ERROR: type[Exception] = getattr(huggingface_hub.errors, "HTTPError", OSError)
"""What the Hub's HTTP client raises for broken connections."""


def fetch_folder(
    repo_id: str, revision: str | None, patterns: list[str], *, force: bool = False, offline: bool = False
) -> Path:
    """The local copy of a repository's files that match ``patterns``; from the cache when the Hub is out of reach."""
    if str(huggingface_hub.constants.HF_HUB_CACHE).startswith("~"):  # left so where there is no home folder
        home("HF_HOME")
    with _translated(repo_id, revision, "is not in the local cache and could not be fetched"):
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, force_download=force, local_files_only=offline
            )
        )


def fetch_file(url: str, path: Path) -> None:
    """Fetch a file of another server, which appears at ``path`` when it is whole.

    A broken transfer is continued, by the next call too, as long as the server has the same version of the file and
    says how large it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = huggingface_hub.get_hf_file_metadata(url, token=False)
        if url.startswith("https:") and found.location.startswith("http:"):
            raise ValueError(f"it leads to {found.location}, which is not secure and was not followed")
        version = hashlib.sha256(f"{url} {found.etag} {found.size}".encode()).hexdigest()[:12]
        partial = path.with_name(f"{path.name}.{version}.partial")
        for other in path.parent.glob(f"{path.name}.*.partial"):
            if other != partial or found.etag is None:
                other.unlink()
        with partial.open("wb" if found.size is None else "ab") as file:
            same = {"If-Range": f'"{found.etag}"'}  # a file that was replaced meanwhile is sent from its beginning
            http_get(url, file, resume_size=file.tell(), headers=same, expected_size=found.size)
        partial.replace(path)
    except (_CLIENT_ERROR, OSError, RuntimeError, ValueError) as error:
        raise BackboneFileError(
            f"{url} could not be fetched ({_reason(error)}). Check the network and its proxy, and the space on the "
            "disk (CMAP_DEFENSE_CACHE moves the folder). What came is kept, and the next call continues it."
        ) from error


def push_files(repo_id: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Make a repository where there is none, and commit files to it. Returns the commit."""
    hub = huggingface_hub.HfApi()
    with _translated(repo_id, None, "could not be pushed to"):
        hub.create_repo(repo_id, private=private, exist_ok=True)
        additions = [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()]
        return hub.create_commit(repo_id, additions, commit_message=message).oid


@contextlib.contextmanager
def _translated(repo_id: str, revision: str | None, failed: str) -> Iterator[None]:
    """The client's errors as this package's."""
    shown = f"{repo_id}@{revision}" if revision else repo_id
    try:
        yield
    except GatedRepoError as error:
        raise UnknownNameError(
            f"{shown} is gated: accept its terms on the Hub, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise UnknownNameError(f"The Hub's {repo_id} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownNameError(
            f"There is no folder and no Hub repository {shown!r} that you may use. "
            "If it is private, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, _CLIENT_ERROR, OSError, RuntimeError, ValueError) as error:
        if _status(error) in (401, 403):
            raise UnknownNameError(
                f"The Hub refuses access to {shown} (status {_status(error)}): log in with `hf auth login`, or set "
                f"HF_TOKEN to a token with the right to it. ({_reason(error)})"
            ) from error
        raise BackboneFileError(
            f"{shown} {failed} ({type(error).__name__}: {_reason(error)}). Check the network, "
            "the space on the disk, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder."
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of the client, which may wrap another."""
    response = getattr(error, "response", None)
    if response is None and error.__cause__ is not None:
        return _status(error.__cause__)
    return getattr(response, "status_code", None)
