"""One large file over HTTP: with progress, resumed where it broke off, checked before it is used.

The Hub's files go through huggingface_hub; this is for checkpoints that lie on their authors' own server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.client
import json
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmap_defense.backbones.weights import sha256_of
from cmap_defense.errors import BackboneFileError

__all__ = ["download"]

BLOCK = 2**20
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
ATTEMPTS = 5
"""Failures in a row, without a byte gained, after which it gives up."""
LONGEST_WAIT = 60.0


@dataclasses.dataclass
class _Transfer:
    """A partial file and what it is a part of; both survive the process."""

    url: str
    partial: Path
    tag: str | None = None
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
                transfer.tag, transfer.total = noted["tag"], noted["total"]
                return transfer
        except (OSError, ValueError, KeyError, TypeError):
            pass
        transfer.forget()
        return transfer

    def note(self) -> None:
        self.notes.write_text(json.dumps({"url": self.url, "tag": self.tag, "total": self.total}), encoding="utf-8")

    def forget(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
        self.tag = self.total = None


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
    _fetch(transfer, size)
    if size is not None and transfer.done != size:
        found = transfer.done
        transfer.forget()
        raise BackboneFileError(
            f"{url} has {found:,} bytes, but {size:,} were expected: it is another file than the one that was "
            "recorded. Do not use it; ask where it is published."
        )
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


def _fetch(transfer: _Transfer, size: int | None) -> None:
    """Bring the partial file to its full length."""
    failures = 0
    while transfer.total is None or transfer.done != transfer.total:
        before = transfer.done
        try:
            if _receive(transfer, size):
                return
            reason, wait = "the connection was cut", 0.0
        except BackboneFileError:
            raise
        except urllib.error.HTTPError as error:
            wait = _wait_for(error, transfer)
            reason = f"status {error.code}"
        except (http.client.HTTPException, urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError) as error:
            reason, wait = str(getattr(error, "reason", error)) or type(error).__name__, 0.0
        except OSError as error:
            raise _disk_error(error, transfer) from error
        failures = 0 if transfer.done > before else failures + 1
        if failures >= ATTEMPTS:
            raise BackboneFileError(
                f"{transfer.url} could not be fetched: {reason}, {failures} times in a row. Check the network and its "
                f"proxy. What there is ({transfer.done:,} bytes) is kept, and the next call continues it."
            )
        _sleep(max(wait, 0.0 if not failures else 2.0 ** (failures - 1)))


def _receive(transfer: _Transfer, size: int | None) -> bool:
    """One request, from where the partial file ends; whether the file is whole afterwards."""
    headers = {"User-Agent": "cmap-defense", "Accept-Encoding": "identity"}
    if transfer.done and transfer.tag:
        headers |= {"Range": f"bytes={transfer.done}-", "If-Range": transfer.tag}
    else:
        transfer.forget()
    request = urllib.request.Request(transfer.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=_certificates(transfer.url)) as answer:
        if answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise BackboneFileError(
                f"{transfer.url} answered with a web page, not a file: a proxy, a login page or a moved address. Open "
                "it in a browser to see."
            )
        if answer.status != 206 or not _continues(answer.headers, transfer):
            transfer.forget()
            transfer.partial.write_bytes(b"")
            if answer.status == 206:
                return False  # another part than the one that was asked for
        length = answer.headers.get("Content-Length")
        if length is not None:
            transfer.total = transfer.done + int(length)
        transfer.tag = _strong_tag(answer.headers)
        transfer.note()
        _check_room(transfer, size)
        with transfer.partial.open("ab") as file, _bar(transfer) as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    return transfer.total is None or transfer.done >= transfer.total


def _continues(headers: Message, transfer: _Transfer) -> bool:
    """Whether an answer is the rest of the very file that the partial one is a part of."""
    begins = str(headers.get("Content-Range", "")).startswith(f"bytes {transfer.done}-")
    return begins and _strong_tag(headers) == transfer.tag


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


def _bar(transfer: _Transfer) -> tqdm[Any]:
    return tqdm(
        total=transfer.total,
        initial=transfer.done,
        unit="B",
        unit_scale=True,
        desc=transfer.url.rpartition("/")[2],
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


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
