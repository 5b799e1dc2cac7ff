"""One large file over HTTP: with progress, resumed where it broke off, checked before it is used.

The Hub's files go through huggingface_hub; this is for checkpoints that lie on their authors' own server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.client
import io
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

from cmap_defense.backbones.remote.messages import tell
from cmap_defense.backbones.weights import sha256_of
from cmap_defense.errors import BackboneFileError

__all__ = ["download"]

BLOCK = 2**20
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
ATTEMPTS = 5
"""Failures in a row, without a byte gained, after which it gives up."""
LONGEST_WAIT = 60.0
WORTH_TELLING = 16 * 2**20
"""Bytes of a file whose progress a log is told of."""


@dataclasses.dataclass
class _Transfer:
    """A partial file and what it is a part of; both survive the process."""

    url: str
    partial: Path
    tag: str | None = None
    etag: str | None = None
    total: int | None = None

    @property
    def done(self) -> int:
        return self.partial.stat().st_size if self.partial.is_file() else 0

    @property
    def notes(self) -> Path:
        return self.partial.with_name(f"{self.partial.name}.json")

    @classmethod
    def resume(cls, url: str, partial: Path) -> _Transfer:
        """The transfer that an earlier process left, when it was of this address and can be continued."""
        transfer = cls(url, partial)
        try:
            noted = json.loads(transfer.notes.read_text(encoding="utf-8"))
            if noted["url"] == url and noted["tag"]:
                transfer.tag, transfer.etag, transfer.total = noted["tag"], noted["etag"], noted["total"]
                return transfer
        except (OSError, ValueError, KeyError, TypeError):
            pass
        transfer.forget()
        return transfer

    def note(self) -> None:
        values = {"url": self.url, "tag": self.tag, "etag": self.etag, "total": self.total}
        self.notes.write_text(json.dumps(values), encoding="utf-8")

    def forget(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
        self.tag = self.etag = self.total = None


def download(url: str, path: Path, *, size: int | None = None, sha256: str | None = None) -> str:
    """Fetch ``url`` to ``path``; the file appears there only when it is whole. Returns its SHA-256.

    Broken connections, status 429 and 5xx are tried again, from where they broke off, as is the next call after a
    process that died. The caller makes sure that only one process does this.

    Args:
        url: http or https; proxies as the environment says.
        path: where to; its folder is made.
        size: expected bytes; None for what the server says.
        sha256: expected; None for any.

    Raises:
        BackboneFileError: it could not be fetched, is not the expected file, or the disk is full; the message says
            which, and what to do. Nothing is left at ``path``; a partial file beside it is continued next time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    transfer = _Transfer.resume(url, path.with_name(f"{path.name}.partial"))
    _fetch(transfer, size, known=size is not None or sha256 is not None)
    if size is not None and transfer.done != size:
        found = transfer.done
        transfer.forget()
        raise BackboneFileError(_other_size(url, found, size))
    checksum = sha256_of(transfer.partial)
    if sha256 is not None and checksum != sha256:
        transfer.forget()
        raise BackboneFileError(
            f"{url} is not the expected file: its SHA-256 is {checksum}, the record says {sha256}. It was removed. "
            "Fetch it again; when it stays so, the file was replaced, and should not be trusted."
        )
    transfer.partial.replace(path)
    transfer.forget()
    return checksum


def _fetch(transfer: _Transfer, size: int | None, *, known: bool) -> None:
    """Bring the partial file to its full length. known: whether a size or checksum will tell if it is whole."""
    failures, restarts, furthest = 0, 0, transfer.done
    while transfer.total is None or transfer.done != transfer.total:
        before = transfer.done
        wait = 0.0
        try:
            if _receive(transfer, size, known=known):
                return
            reason = "the connection was cut"
        except BackboneFileError:
            raise
        except urllib.error.HTTPError as error:
            wait = _wait_for(error, transfer)
            reason = f"status {error.code}"
        except _Unwritable as error:
            raise _disk_error(error.cause, transfer) from error.cause
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:  # an address that is none
            raise BackboneFileError(f"{transfer.url} cannot be fetched: {error}.") from error
        restarts += transfer.done < before
        failures = 0 if transfer.done > furthest else failures + 1
        furthest = max(furthest, transfer.done)
        if failures >= ATTEMPTS or restarts >= ATTEMPTS:
            raise BackboneFileError(
                f"{transfer.url} could not be fetched: {reason}, after {max(failures, restarts)} attempts. Check the "
                f"network and its proxy. What there is ({transfer.done:,} bytes) is kept, and the next call continues "
                "it where the server can."
            )
        _sleep(max(wait, 0.0 if not failures else 2.0 ** (failures - 1)))


def _receive(transfer: _Transfer, size: int | None, *, known: bool) -> bool:
    """One request, from where the partial file ends; whether the file is whole afterwards."""
    headers = {"User-Agent": "cmap-defense", "Accept-Encoding": "identity"}
    if transfer.done and transfer.tag:
        headers |= {"Range": f"bytes={transfer.done}-", "If-Range": transfer.tag}
    else:
        transfer.forget()
    request = urllib.request.Request(transfer.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=_certificates(transfer.url)) as answer:
        _refuse_foreign(transfer, answer)
        begin, total = _extent(answer)
        if answer.status == 206 and not _continues(answer.headers, begin, total, transfer):
            transfer.forget()
            return False  # a part of another file, or another part
        if answer.status != 206:
            transfer.forget()
            with _writing():
                transfer.partial.write_bytes(b"")
            transfer.tag, transfer.etag = _strong_tag(answer.headers), answer.headers.get("ETag")
        transfer.total = total
        if total is None and not known and not answer.chunked:
            raise BackboneFileError(
                f"{transfer.url}: the server does not say how long the file is, so nobody can tell when it is whole. "
                "Fetch it in another way, and convert it with `cmap-defense backbones convert`."
            )
        if size is not None and total not in (None, size):
            transfer.forget()
            raise BackboneFileError(_other_size(transfer.url, total, size))
        with _writing():
            transfer.note()
        _check_room(transfer, size)
        with _writing():
            file = transfer.partial.open("ab", buffering=0)
        try:
            with _Progress(transfer) as progress:
                while block := answer.read1(BLOCK):
                    with _writing():
                        _write_all(file, block)
                    progress.update(len(block))
        finally:
            with _writing():
                file.close()
    return transfer.total is None or transfer.done == transfer.total


def _write_all(file: io.FileIO, block: bytes) -> None:
    """Every byte: an unbuffered file may take a part of them."""
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


class _Unwritable(Exception):
    """Writing to the disk failed, in contrast to reading from the network, which raises the same errors."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Unwritable(error) from error


def _refuse_foreign(transfer: _Transfer, answer: Any) -> None:
    """Raise for an answer that cannot be the file: a web page, something compressed, an address that is not secure."""
    if answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise BackboneFileError(
            f"{transfer.url} answered with a web page, not a file: a proxy, a login page or a moved address. Open "
            "it in a browser to see."
        )
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise BackboneFileError(
            f"{transfer.url} is served compressed ({answer.headers['Content-Encoding']}), which was not asked for. A "
            "proxy may do that; fetch it without."
        )
    if transfer.url.startswith("https:") and not answer.geturl().startswith("https:"):
        raise BackboneFileError(f"{transfer.url} leads to {answer.geturl()}, which is not secure; it was not followed.")


def _extent(answer: Any) -> tuple[int, int | None]:
    """Where the bytes of an answer begin, and the length of the whole file; None when the server does not say."""
    length = answer.headers.get("Content-Length", "")
    if answer.status != 206:
        return 0, int(length) if length.isdigit() and not answer.chunked else None
    said = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", "").strip())
    return (int(said[1]), int(said[2])) if said else (-1, None)


def _continues(headers: Message, begin: int, total: int | None, transfer: _Transfer) -> bool:
    """Whether an answer is the rest of the very file that the partial one is a part of."""
    tag = headers.get("ETag") or headers.get("Last-Modified")
    same = tag is None or tag in (transfer.tag, transfer.etag)
    return begin == transfer.done and same and transfer.total in (None, total) and total is not None


def _strong_tag(headers: Message) -> str | None:
    """What a later request names, so that it is not continued with another file's bytes."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _wait_for(error: urllib.error.HTTPError, transfer: _Transfer) -> float:
    """Seconds until a failed request is worth another try; those that are not raise."""
    with error:
        if error.code == 416:  # the partial file is not a part of this one
            transfer.forget()
            return 0.0
        if error.code == 429 or error.code >= 500:
            asked = error.headers.get("Retry-After", "") if error.headers else ""
            return min(float(asked), LONGEST_WAIT) if asked.isdigit() else 0.0
    hint = {
        401: "It wants a login.",
        403: "Access is refused; some networks and countries are barred.",
        404: "It is not there any more; look where its authors publish it now.",
    }.get(error.code, "")
    raise BackboneFileError(f"{transfer.url} could not be fetched: status {error.code}. {hint}".rstrip()) from error


def _other_size(url: str, found: int | None, size: int) -> str:
    return (
        f"{url} has {found or 0:,} bytes, but {size:,} were expected: it is another file than the one that was "
        "recorded. Do not use it; ask where it is published."
    )


def _check_room(transfer: _Transfer, size: int | None) -> None:
    total = size or transfer.total
    free = shutil.disk_usage(transfer.partial.parent).free
    if total is not None and total - transfer.done > free:
        raise BackboneFileError(
            f"{transfer.partial.parent} has {free / 2**20:,.0f} MiB free, but {transfer.url} needs another "
            f"{(total - transfer.done) / 2**20:,.0f} MiB. Make room, or set CMAP_DEFENSE_CACHE to a larger disk."
        )


def _disk_error(error: OSError, transfer: _Transfer) -> BackboneFileError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return BackboneFileError(
        f"{transfer.partial} could not be written: {'the disk is full' if full else error}. "
        "Make room, or set CMAP_DEFENSE_CACHE to another folder; the next call continues where this one ended."
    )


class _Progress:
    """A bar on a terminal; elsewhere, such as in a job's log, a line for every tenth of the file."""

    def __init__(self, transfer: _Transfer) -> None:
        self.done, self.total, self.name = transfer.done, transfer.total, transfer.url.rpartition("/")[2]
        self.told = self._tenth()
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(
            total=self.total,
            initial=self.done,
            unit="B",
            unit_scale=True,
            desc=self.name,
            disable=not terminal,
            dynamic_ncols=True,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, count: int) -> None:
        """``count`` more bytes are there."""
        self.done += count
        self.bar.update(count)
        if self.bar.disable and (self.total or 0) > WORTH_TELLING and self._tenth() > self.told:
            self.told = self._tenth()
            tell(f"{self.name}: {self.done / 2**20:,.0f} of {(self.total or 0) / 2**20:,.0f} MiB")

    def _tenth(self) -> int:
        return 10 * self.done // self.total if self.total else 0


def _certificates(url: str) -> ssl.SSLContext | None:
    """The system's certificates, and certifi's where it is installed, for Pythons that have no others."""
    if not url.startswith("https:"):
        return None
    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _sleep(seconds: float) -> None:
    if seconds:
        time.sleep(seconds)
