"""One large file over HTTP: with progress, resumed where it broke off, checked before it is used.

The Hub's files go through huggingface_hub; this is for checkpoints on their authors' own server.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmap_defense.backbones.remote.messages import announce
from cmap_defense.backbones.weights import sha256_of
from cmap_defense.errors import BackboneFileError

BLOCK = 2**20
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
ATTEMPTS = 5
"""Failures in a row, without a byte gained, after which a download is given up."""
LONGEST_WAIT = 60.0
LARGE = 16 * 2**20
"""Bytes of a file whose progress is logged where there is no terminal."""

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

    Args:
        url: http or https; proxies as the environment says.
        path: where to; its folder is made.
        size: expected bytes; None for what the server says.
        sha256: expected; None for any.

    Returns:
        The file's SHA-256.

    Raises:
        BackboneFileError: it could not be fetched, is not the expected file, or the disk is full; the message says
            which, and what to do. Nothing is left at ``path``; a partial file beside it is continued next time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _PartialFile(url, path.with_name(f"{path.name}.partial"))
    failures, restarts, longest = 0, 0, part.done
    while part.total is None or part.done != part.total:
        before = part.done
        wait = 0.0
        try:
            if _request(part, size, known=size is not None or sha256 is not None):
                break
            reason = "the connection was cut"
        except BackboneFileError:
            raise
        except urllib.error.HTTPError as error:
            wait, reason = _wait_after(error, part), f"status {error.code}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:
            raise BackboneFileError(f"{url} is no web address ({error}) and cannot be fetched.") from error
        restarts += part.done < before
        failures = 0 if part.done > longest else failures + 1
        longest = max(longest, part.done)
        if max(failures, restarts) >= ATTEMPTS:
            raise BackboneFileError(
                f"{url} could not be fetched: {reason}, after {max(failures, restarts)} attempts. Check the network "
                f"and its proxy. What there is ({part.done:,} bytes) is kept, and the next call continues it where the "
                "server can."
            )
        wait = max(wait, 2.0 ** (failures - 1) if failures else 0.0)
        if wait:
            time.sleep(wait)
    _require_size(part, part.done, size)
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

    Args:
        url: of the file.
        path: of the partial file. One that is there is removed unless it is of this address and names its version.
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

    Args:
        known: whether a size or checksum will show if it is whole.
    """
    headers = {"User-Agent": "cmap-defense", "Accept-Encoding": "identity"}
    if part.done and part.version:
        headers |= {"Range": f"bytes={part.done}-", "If-Range": part.version}
    else:
        part.remove()
    request = urllib.request.Request(part.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=_certificates(part.url)) as response:
        _require_file(part.url, response)
        version, (start, total) = _version(response.headers), _extent(response)
        if response.status == 206:
            continues = version in (None, part.version) and start == part.done and part.total in (None, total)
            if not continues or total is None:  # a part of another file, or another part
                part.remove()
                return False
            version = part.version
        else:
            part.remove()
        if total is None and not known and not response.chunked:
            raise BackboneFileError(
                f"{part.url}: the server does not say how long the file is, so nobody can tell when it is whole. "
                "Fetch it in another way, and convert it with `cmap-defense backbones convert`."
            )
        if total is not None:
            _require_size(part, total, size)
        part.begin(version, total)
        _require_room(part, size or total)
        with part.writing():
            file = part.path.open("ab", buffering=0)
        with file, _progress(part) as advance:
            while block := response.read1(BLOCK):
                view = memoryview(block)
                while view:  # an unbuffered file may take a part
                    with part.writing():
                        view = view[file.write(view) :]
                advance(len(block))
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


def _version(headers: Message) -> str | None:
    """What identifies a file's content for If-Range: a strong ETag, or the date."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _extent(response: Any) -> tuple[int, int | None]:
    """Where the bytes of a response start, and the length of the whole file; None when the server does not say."""
    if response.status == 206:
        stated = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip())
        return (int(stated[1]), int(stated[2])) if stated else (-1, None)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() and not response.chunked else None


def _wait_after(error: urllib.error.HTTPError, part: _PartialFile) -> float:
    """Seconds until a failed request is worth another try; those that are not raise."""
    with error:
        if error.code == 416:  # the partial file is not a part of this one
            part.remove()
            return 0.0
        if error.code == 429 or error.code >= 500:
            seconds = error.headers.get("Retry-After", "") if error.headers else ""
            return min(float(seconds), LONGEST_WAIT) if seconds.isdigit() else 0.0
    hint = _REFUSALS.get(error.code, "")
    raise BackboneFileError(f"{part.url} could not be fetched: status {error.code}. {hint}".rstrip()) from error


def _require_size(part: _PartialFile, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        part.remove()
        raise BackboneFileError(
            f"{part.url} has {found:,} bytes, but {expected:,} were expected: it is another file than the one that was "
            "recorded. Do not use it; look where its authors publish it."
        )


def _require_room(part: _PartialFile, total: int | None) -> None:
    free = shutil.disk_usage(part.path.parent).free
    if total is not None and total - part.done > free:
        raise BackboneFileError(
            f"{part.path.parent} has {free / 2**20:,.0f} MiB free, but {part.url} needs another "
            f"{(total - part.done) / 2**20:,.0f} MiB. Make room, or set CMAP_DEFENSE_CACHE to a larger disk."
        )


@contextlib.contextmanager
def _progress(part: _PartialFile) -> Iterator[Any]:
    """A function that takes the count of further bytes: a bar on a terminal, elsewhere a line for each tenth."""
    name, total, done = part.url.rpartition("/")[2], part.total, part.done
    terminal = sys.stderr is not None and sys.stderr.isatty()
    bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=name, disable=not terminal)

    def advance(count: int) -> None:
        nonlocal done
        tenth, done = 10 * done // (total or 1), done + count
        bar.update(count)
        if not terminal and (total or 0) > LARGE and 10 * done // (total or 1) > tenth:
            announce(f"{name}: {done / 2**20:,.0f} of {(total or 0) / 2**20:,.0f} MiB")

    with bar:
        yield advance


def _certificates(url: str) -> ssl.SSLContext | None:
    """The system's certificates, and certifi's where it is installed, for Pythons that have no others."""
    if not url.startswith("https:"):
        return None
    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context
