"""Steps in a process of their own, since the Hub's client reads its environment when it is imported.

A test calls :func:`run_elsewhere` or :func:`start_elsewhere`; the process runs this file. A step is the name of one of
the functions in ``STEPS`` and its arguments, JSON values all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from patience import HANGS

__all__ = ["NOWHERE", "Answer", "finish", "run_elsewhere", "start_elsewhere"]

NOWHERE = "http://127.0.0.1:9"
"""An address at which nobody listens."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one step: a value, or an error's message and the names of its classes; and what was printed."""

    value: Any = None
    error: str = ""
    kinds: tuple[str, ...] = ()
    out: str = ""
    err: str = ""


def start_elsewhere(
    *steps: list[Any] | tuple[Any, ...], home: Path, address: str = NOWHERE, offline: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """Begin the steps.

    Args:
        steps: to be done in turn; one that fails does not keep the next from being done.
        home: HF_HOME, with the caches of the client and of this package.
        address: of the Hub.
        offline: whether HF_HUB_OFFLINE is set.
        environment: further variables.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "CMAP_")) and not name.lower().endswith("_proxy")
    }
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(steps)],
        env=kept | settings | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[Answer]:
    """The answers, one for each step, when all are done."""
    try:
        out, err = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return [Answer(**answer) for answer in json.loads(out.splitlines()[-1])]


def run_elsewhere(
    *steps: list[Any] | tuple[Any, ...], home: Path, address: str = NOWHERE, offline: bool = False, **environment: str
) -> list[Answer]:
    """Do the steps; arguments as for :func:`start_elsewhere`."""
    return finish(start_elsewhere(*steps, home=home, address=address, offline=offline, **environment))


# ----------------------------------------------------------------------------------------------------- the other side


def load(source: str) -> dict[str, Any]:
    """A consistency model's name, shape, licence and fingerprint."""
    from cmap_defense.backbones.load import load_backbone
    from tiny import fingerprint

    backbone = load_backbone(source)
    assert backbone.record is not None
    record = backbone.record
    return {
        "name": record.name,
        "shape": list(backbone.image_shape),
        "licence": record.licence,
        "source": record.source,
        "fingerprint": fingerprint(backbone),
    }


def pull(source: str, force: bool = False) -> str:
    """The local folder."""
    from cmap_defense.backbones.load import resolve_backbone

    return str(resolve_backbone(source, force=force))


def verify(source: str) -> dict[str, Any]:
    """What was found."""
    from cmap_defense.backbones.verify import verify_backbone

    return verify_backbone(source).to_dict()


def push(folder: str, repo_id: str, private: bool = False) -> str:
    """Where the folder is now."""
    from cmap_defense.backbones.push import push_backbone

    return push_backbone(folder, repo_id, private=private)


def push_and_load(folder: str, repo_id: str, private: bool = False) -> dict[str, Any]:
    """Where the folder is now, and what is there."""
    pushed = push(folder, repo_id, private)
    return {"pushed": pushed} | load(pushed)


def cli(*arguments: str) -> int:
    """The exit status of ``cmap-defense``."""
    from cmap_defense.cli.main import main

    return main(list(arguments))


def environ(name: str, value: str | None) -> None:
    """Set a variable, or remove it."""
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def hurry() -> None:
    """Let nothing wait longer than a moment from now on: the client waits between its attempts."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.005))


def largest_file(size: int) -> None:
    """Let the system refuse to write files beyond a size, as a full disk would; -1 for any."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def name(given: str, *sources: dict[str, Any], kind: str = "consistency") -> None:
    """Name a tiny model; a source is the fields of a HubRepository or an OfficialFile."""
    from cmap_defense.backbones.registry import HubRepository, OfficialFile, register
    from tiny import CONFIG, tiny_entry

    made = [OfficialFile(**source, config=CONFIG) if "url" in source else HubRepository(**source) for source in sources]
    register(tiny_entry(given, *made, kind=kind), replace=True)


def entry(given: str) -> dict[str, Any]:
    """What is known of a name."""
    from cmap_defense.backbones.registry import registry_entry
    from cmap_defense.backbones.remote.cache import pinned

    return pinned(registry_entry(given)).to_dict()


def die_in_conversion() -> None:
    """Let the process be killed when a converted model is written to the half."""
    from cmap_defense.backbones.remote import fetch

    def half(_: object, folder: Path, **__: object) -> None:
        (folder / "weights.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    fetch.write_backbone = half


_FETCH, _SHARE, _PREPARE = (load, pull, verify, entry), (push, push_and_load, cli), (environ, hurry, largest_file, name)
STEPS = {step.__name__: step for step in (*_FETCH, *_SHARE, *_PREPARE, die_in_conversion)}


class Heard(io.StringIO):
    """What is printed to standard error, which is printed there too."""

    def write(self, text: str) -> int:
        os.write(2, text.encode())
        return super().write(text)


def main(steps: list[list[Any]]) -> None:
    """Do the steps and print the answers."""
    answers = []
    for step, *arguments in steps:
        out, err = io.StringIO(), Heard()
        answer = Answer()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                answer = Answer(value=STEPS[step](*arguments))
            except Exception as error:
                answer = Answer(error=str(error), kinds=tuple(kind.__name__ for kind in type(error).__mro__))
        answers.append(dataclasses.asdict(dataclasses.replace(answer, out=out.getvalue(), err=err.getvalue())))
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
