"""One large file over HTTP: with progress, resumed where it broke off, checked before it is used.

The Hub's files go through huggingface_hub; this is for checkpoints on their authors' own server.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmap_defense.backbones.weights import sha256_of
from cmap_defense.errors import BackboneFileError

BLOCK = 2**20
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
ATTEMPTS = 5
"""Failures in a row, without a byte gained, after which a download is given up."""

_REFUSALS = {
    401: "It needs a login.",
    403: "Access is refused; some networks and countries are barred.",
    404: "It is not there any more; look where its authors publish it now.",
}


def download(url: str, path: Path, *, size: int | None = None, sha256: str | None = None) -> str:
    """Fetch ``url`` to ``path``; the file appears there only when it is whole.

    Broken connections, status 429 and 5xx are tried again, from where they broke off. After a process that died, the
    next call continues its partial file, where the server names the file's version (ETag or Last-Modified). The caller
    makes sure that only one process does this.

    Returns:
        The file's SHA-256.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _PartialFile(url, path.with_name(f"{path.name}.partial"))
    failures, longest = 0, part.done
    while part.total is None or part.done != part.total:
        try:
            if _request(part, size, known=size is not None or sha256 is not None):
                break
            reason = "the connection was cut"
        except BackboneFileError:
            raise
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the partial file is not a part of this one
                part.remove()
            elif error.code != 429 and error.code < 500:
                hint = _REFUSALS.get(error.code, "")
                raise BackboneFileError(f"{url} could not be fetched: status {error.code}. {hint}".rstrip()) from error
            reason = f"status {error.code}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:
            raise BackboneFileError(f"{url} is no web address ({error}) and cannot be fetched.") from error
        failures = 0 if part.done > longest else failures + 1
        longest = max(longest, part.done)
        if failures >= ATTEMPTS:
            raise BackboneFileError(
                f"{url} could not be fetched: {reason}, after {failures} attempts. Check the network and its proxy. "
                f"What there is ({part.done:,} bytes) is kept, and the next call continues it where the server can."
            )
        if failures:
            time.sleep(2.0 ** (failures - 1))
    part.require_size(part.done, size)
    checksum = sha256_of(part.path)
    if sha256 is not None and checksum != sha256:
        part.remove()
        raise BackboneFileError(
            f"{url} is not the expected file: its SHA-256 is {checksum}, the record says {sha256}. It was removed. "
            "Fetch it again; when it stays so, the file was replaced, and should not be trusted."
        )
    part.path.replace(path)
    part.remove()
    return checksum


class _PartialFile:
    """What there is of a file, and in a JSON file beside it its address, version and length; both survive the process.

    One that is there is removed unless it is of this address and names its version.
    """

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path, self.notes = url, path, path.with_name(f"{path.name}.json")
        try:
            noted = json.loads(self.notes.read_text(encoding="utf-8"))
            self.version, self.total = noted["version"], noted["total"]
            if noted["url"] != url or not self.version:
                self.remove()
        except (OSError, ValueError, KeyError, TypeError):
            self.remove()

    @property
    def done(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
        self.version: str | None = None
        self.total: int | None = None

    def begin(self, version: str | None, total: int | None) -> None:
        """Note what the bytes are from now on, before the first of them is written."""
        self.version, self.total = version, total
        with self.writing():
            self.path.touch()
            self.notes.write_text(json.dumps({"url": self.url, "version": version, "total": total}), encoding="utf-8")

    def require_size(self, found: int, expected: int | None) -> None:
        if expected is not None and found != expected:
            self.remove()
            raise BackboneFileError(
                f"{self.url} has {found:,} bytes, but {expected:,} were expected: it is another file than the one that "
                "was recorded. Do not use it; look where its authors publish it."
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Errors of the disk, in contrast to those of the network, which are of the same class."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise BackboneFileError(
                f"{self.path} could not be written: {'the disk is full' if full else error}. Make room, or set "
                "CMAP_DEFENSE_CACHE to another folder; the next call continues where this one ended."
            ) from error


def _request(part: _PartialFile, size: int | None, *, known: bool) -> bool:
    """One request, from where the partial file ends; whether the file is whole afterwards.

    ``known`` says whether a size or checksum will show if it is whole.
    """
    headers = {"User-Agent": "cmap-defense", "Accept-Encoding": "identity"}
    if part.done and part.version:
        headers |= {"Range": f"bytes={part.done}-", "If-Range": part.version}
    else:
        part.remove()
    request = urllib.request.Request(part.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=_certificates(part.url)) as response:
        _require_file(part.url, response)
        tag = response.headers.get("ETag")  # a weak one does not identify the content
        version = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() and not response.chunked else None
        if response.status == 206:
            stated = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip())
            same = version in (None, part.version) and stated and int(stated[1]) == part.done
            if not stated or not same or part.total not in (None, int(stated[2])):  # of another file, or another part
                part.remove()
                return False
            version, total = part.version, int(stated[2])
        else:
            part.remove()
        if total is None and not known and not response.chunked:
            raise BackboneFileError(
                f"{part.url}: the server does not say how long the file is, so nobody can tell when it is whole. "
                "Fetch it in another way, and convert it with `cmap-defense backbones convert`."
            )
        if total is not None:
            part.require_size(total, size)
        part.begin(version, total)
        with part.writing():
            file = part.path.open("ab", buffering=0)
        log = {} if sys.stderr is None or sys.stderr.isatty() else {"mininterval": 30.0, "delay": 30.0, "ascii": True}
        name = part.url.rpartition("/")[2]
        with file, tqdm(total=total, initial=part.done, unit="B", unit_scale=True, desc=name, **log) as bar:
            while block := response.read1(BLOCK):
                view = memoryview(block)
                while view:  # an unbuffered file may take a part
                    with part.writing():
                        view = view[file.write(view) :]
                bar.update(len(block))
    return part.total is None or part.done == part.total


def _require_file(url: str, response: Any) -> None:
    """Raise for a response that cannot be the file: a web page, something compressed, or from an insecure address."""
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise BackboneFileError(
            f"{url} gives a web page, not a file: a proxy, a login page or a moved address. Open it in a browser."
        )
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise BackboneFileError(f"{url} is served compressed ({encoding}), perhaps by a proxy; fetch it without.")
    if url.startswith("https:") and not response.geturl().startswith("https:"):
        raise BackboneFileError(f"{url} leads to {response.geturl()}, which is not secure; it was not followed.")


def _certificates(url: str) -> ssl.SSLContext | None:
    """The system's certificates, and certifi's where it is installed, for Pythons that have no others."""
    if not url.startswith("https:"):
        return None
    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context
