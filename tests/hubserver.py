"""A server on the loopback device: files at any path, and as much of the Hub's file API as its real client needs.

It makes the mistakes of servers and networks that a :class:`Fault` describes, and keeps all requests.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import disable_progress_bars

from patience import HANGS

NOWHERE = "http://127.0.0.1:9"
"""An address at which nobody listens."""
ALWAYS = 10**9
"""Times of a :class:`Fault` that never ends."""
TOKEN, OTHER_TOKEN = "hf_ofSomeone", "hf_ofAnother"
"""Of the organisation "someone", and of somebody who may read what is public."""
OWNER = "someone"


@dataclasses.dataclass
class Request:
    """A request, and the response to it: the status, 0 for none, and the bytes of the body that were sent."""

    method: str
    path: str
    range: str | None
    if_range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with the next requests for a path."""

    methods: tuple[str, ...] = ("GET",)  # of the requests
    times: int = 1  # how many requests it lasts, before the next fault of the path has its turn
    status: int | None = None  # of the response, in place of the right one
    body: bytes | None = None  # of the response, in place of the right one
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the response, in place of the right ones
    cut: int | None = None  # bytes of the body after which the connection ends
    reset: bool = False  # whether it ends with an error
    stall: int | None = None  # bytes of the body after which nothing comes until ``server.go_on`` is set
    hang_up: bool = False  # whether the connection ends without a response
    afterwards: Callable[[], object] | None = None  # called when all this has happened


@dataclasses.dataclass(frozen=True)
class Stored:
    """A file at some path."""

    content: bytes  # its bytes
    _: dataclasses.KW_ONLY
    tag: str | None = None  # its ETag; the checksum where it is None, none where it is empty
    modified: str | None = None  # its Last-Modified, or none
    ranges: bool = True  # whether requests for a part get a part
    if_range: bool = True  # whether only where If-Range names this file
    chunked: bool = False  # whether it is sent in chunks, without its length
    endless: bool = False  # whether it is sent without its length, to the end of the connection
    kind: str = "application/octet-stream"  # its Content-Type

    @property
    def etag(self) -> str:
        """As it stands in the header."""
        return f'"{hashlib.sha1(self.content).hexdigest()}"' if self.tag is None else self.tag


@dataclasses.dataclass
class Repository:
    """A model repository of the Hub."""

    private: bool = False  # whether its owner alone can read it
    gated: bool = False  # whether its owner alone can read its files
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)  # the files of each, oldest first
    refs: dict[str, str] = dataclasses.field(default_factory=dict)  # commits of branches and tags
    messages: list[str] = dataclasses.field(default_factory=list)  # of the commits that were sent

    def commit(self, files: Mapping[str, bytes]) -> str:
        """Add a commit to the main branch that holds ``files`` and no others; returns its name."""
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for path in sorted(files):
            digest.update(path.encode() + hashlib.sha1(files[path]).digest())
        self.commits[digest.hexdigest()] = dict(files)
        self.refs["main"] = digest.hexdigest()
        return digest.hexdigest()

    @property
    def newest(self) -> dict[str, bytes]:
        """The files of the main branch."""
        return self.commits.get(self.refs.get("main", ""), {})


@dataclasses.dataclass
class Response:
    """One response, before anything goes wrong with it."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    chunked: bool = False
    endless: bool = False


class HubServer:
    """What the server holds, and the requests that it got."""

    def __init__(self, address: str) -> None:
        self.address = address  # of the server
        self.files: dict[str, Stored] = {}  # by path, such as "/a/b"
        self.repositories: dict[str, Repository] = {}  # by organisation/name
        self.requests: list[Request] = []  # oldest first
        self.go_on = threading.Event()  # ends what stalls
        self._large: dict[str, bytes] = {}
        self._scripts: dict[str, list[tuple[Fault, list[int]]]] = {}
        self._lock = threading.Lock()

    def put(self, path: str, stored: Stored | bytes) -> str:
        """Store a file. Returns its address."""
        self.files[path] = stored if isinstance(stored, Stored) else Stored(stored)
        return self.address + path

    def repository(self, repo_id: str, files: Mapping[str, bytes] | None = None, **options: bool) -> Repository:
        """Make a repository, with one commit where files are given."""
        self.repositories[repo_id] = made = Repository(**options)
        if files is not None:
            made.commit(files)
        return made

    def script(self, path: str, *faults: Fault) -> None:
        """Let requests for a path go wrong, one fault after the other; ``*`` stands for any text."""
        self._scripts[path] = [(fault, [fault.times]) for fault in faults]

    def requests_for(self, path: str = "*", method: str = "GET", since: int = 0) -> list[Request]:
        """The requests for a path, ``*`` standing for any text, from the one of that number on."""
        return [r for r in self.requests[since:] if r.method == method and fnmatchcase(r.path, path)]

    def fault(self, request: Request) -> Fault:
        """What goes wrong with a request; counts it."""
        with self._lock:
            for path, script in self._scripts.items():
                if fnmatchcase(request.path, path):
                    for fault, left in script:
                        if left[0] > 0:
                            if request.method not in fault.methods:
                                break
                            left[0] -= 1
                            return fault
        return Fault()

    # ----------------------------------------------------------------------------------------------------- responses

    def respond(self, request: Request, body: bytes) -> Response:
        """The right response."""
        if request.path in self.files:
            return _file(self.files[request.path], request)
        if request.method in ("GET", "HEAD"):
            return self._read(request)
        if request.path.startswith("/large/"):  # an upload address, which needs no token
            self._large[hashlib.sha256(body).hexdigest()] = body
            return Response(200 if request.path.endswith(hashlib.sha256(body).hexdigest()) else 400, {})
        if request.token is None:
            return _refusal(401, "Invalid username or password.")
        return self._write(request, body)

    def _read(self, request: Request) -> Response:
        api = request.path.startswith("/api/models/")
        if not api and "/resolve/" not in request.path:
            return _refusal(404, "Not found")
        parts = request.path.removeprefix("/api/models" if api else "").strip("/").split("/")
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        if request.token not in (None, TOKEN, OTHER_TOKEN):
            return _refusal(401, "Invalid credentials in Authorization header")
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and not _owns(request, repo_id)):
            if request.token is None:  # the Hub does not show strangers what there is
                return _refusal(401, "Invalid username or password.", "RepoNotFound")
            return _refusal(404, "Repository not found", "RepoNotFound")
        revision = unquote(rest[1]) if len(rest) > 1 else "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return _refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = repository.commits[commit]
        if api and (not rest or rest[0] == "revision"):
            siblings = [{"rfilename": name} for name in files]
            return _json({"_id": "1", "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings})
        if api and rest[0] == "tree":
            return _json([_tree_entry(name, content) for name, content in files.items()])
        if repository.gated and not _owns(request, repo_id):
            status = 401 if request.token is None else 403
            return _refusal(status, f"Access to model {repo_id} is restricted.", "GatedRepo")
        name = unquote("/".join(rest[2:]))
        response = _refusal(404, "Entry not found", "EntryNotFound")
        if name in files:
            response = _file(Stored(files[name], tag=f'"{_content_name(name, files[name])}"'), request)
        response.headers["X-Repo-Commit"] = commit
        return response

    def _write(self, request: Request, body: bytes) -> Response:
        parts = request.path.strip("/").split("/")
        if request.path == "/api/validate-yaml":
            head = json.loads(body)["content"]
            errors = [] if head.startswith("---\n") else [{"message": '"---" is missing'}]
            return _json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if request.path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            if not _owns(request, repo_id):
                return _refusal(403, f"You don't have the rights to create a model under {wanted['organization']}")
            url = {"url": f"{self.address}/{repo_id}", "name": repo_id}
            if repo_id in self.repositories:
                return _json(url | {"error": "You already created this model repo"}, 409)
            self.repository(repo_id, {}, private=wanted.get("visibility") == "private")
            return _json(url)
        repo_id = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        if repo_id not in self.repositories or not _owns(request, repo_id):
            return _refusal(403, "You have no right to write here")
        if parts[-1] == "batch":
            objects = [
                {"oid": o["oid"], "size": o["size"]}
                | (
                    {}
                    if o["oid"] in self._large
                    else {"actions": {"upload": {"href": f"{self.address}/large/{o['oid']}"}}}
                )
                for o in json.loads(body)["objects"]
            ]
            return Response(
                200, {"Content-Type": "application/vnd.git-lfs+json"}, json.dumps({"objects": objects}).encode()
            )
        if parts[4] == "preupload":
            there = self.repositories[repo_id].newest
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _content_name(file["path"], there[file["path"]]) if file["path"] in there else None,
                }
                for file in json.loads(body)["files"]
            ]
            return _json({"files": files})
        return self._commit(self.repositories[repo_id], repo_id, body)

    def _commit(self, repository: Repository, repo_id: str, body: bytes) -> Response:
        files = dict(repository.newest)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                repository.messages.append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
        commit = repository.commit(files)
        return _json({"commitOid": commit, "commitUrl": f"{self.address}/{repo_id}/commit/{commit}"})


def _owns(request: Request, repo_id: str) -> bool:
    return request.token == TOKEN and repo_id.startswith(f"{OWNER}/")


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _content_name(path: str, content: bytes) -> str:
    """What the Hub calls a file's content: its SHA-256 where it is large, else what git calls it."""
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _content_name("", content)}
    if _is_large(path):
        entry["lfs"] = {"oid": _content_name(path, content), "size": len(content), "pointerSize": 134}
    return entry


def _json(value: object, status: int = 200) -> Response:
    return Response(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _refusal(status: int, message: str, code: str = "") -> Response:
    response = _json({"error": message}, status)
    response.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return response


def _file(stored: Stored, request: Request) -> Response:
    """The file, or the part of it that the request names."""
    headers = {"Content-Type": stored.kind}
    headers |= {"ETag": stored.etag} if stored.etag else {}
    headers |= {"Last-Modified": stored.modified} if stored.modified else {}
    whole = Response(200, headers, stored.content, stored.chunked, stored.endless)
    if request.range is None or not stored.ranges:
        return whole
    if stored.if_range and request.if_range not in (None, stored.etag, stored.modified):
        return whole
    start, size = int(request.range.removeprefix("bytes=").rstrip("-")), len(stored.content)
    if start >= size:
        return Response(416, {"Content-Range": f"bytes */{size}"})
    part = {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
    return Response(206, headers | part, stored.content[start:], stored.chunked, stored.endless)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = HANGS
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        request = Request(
            self.command,
            urlsplit(self.path).path,
            self.headers.get("Range"),
            self.headers.get("If-Range"),
            token.removeprefix("Bearer ") if token else None,
        )
        with contextlib.suppress(ConnectionError):
            body = self._body()
            fault = self.hub.fault(request)
            self.hub.requests.append(request)
            if fault.hang_up:
                self.close_connection = True
            else:
                response = self.hub.respond(request, body)
                if fault.status is not None:
                    response = Response(fault.status, {"Content-Type": "text/plain"}, fault.body or b"")
                elif fault.body is not None:
                    response.body = fault.body
                response.headers |= fault.headers
                self._send(response, fault, request)
            if fault.afterwards is not None:
                fault.afterwards()

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, response: Response, fault: Fault, request: Request) -> None:
        request.status = response.status
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if response.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif response.endless:
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body, size = response.body, len(response.body)
        for end in sorted({min(n, size) for n in (fault.stall, fault.cut, size) if n is not None}):
            part = body[request.sent : end]
            if part:
                request.sent = end  # before the client can have it all, and look
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if response.chunked else part)
                self.wfile.flush()
            if end == fault.cut:
                self.close_connection = True
                if fault.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                return
            if end == fault.stall:
                self.hub.go_on.wait(HANGS)
        if response.chunked:
            self.wfile.write(b"0\r\n\r\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True


@contextlib.contextmanager
def serving() -> Iterator[HubServer]:
    """A server at work."""
    server = _Server(("127.0.0.1", 0), _Handler)
    hub = HubServer(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


def connect_client(monkeypatch: pytest.MonkeyPatch, address: str, home: Path) -> None:
    """Let the Hub's client of this process use a server, and caches in ``home``; it never waits for long.

    The client reads its environment when it is imported; afterwards its constants stand for the environment.
    """
    values: dict[str, Any] = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CMAP_DEFENSE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))
    disable_progress_bars()
    close_session()  # its connections are to the server of another test
