"""Steps in another process, which a test can kill, or which has an environment of its own.

A test calls :func:`run_elsewhere` or :func:`start_elsewhere`; the process runs this file. A step is the name of one of
the functions in ``STEPS`` and its arguments, all of them JSON values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
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
    """The outcome of one step: a value, or an error's message and the names of its classes; and what was printed."""

    value: Any = None
    error: str = ""
    kinds: tuple[str, ...] = ()
    out: str = ""
    err: str = ""


def start_elsewhere(
    *steps: list[Any] | tuple[Any, ...], home: Path, address: str = NOWHERE, offline: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """Start a process that takes the steps.

    Args:
        steps: in their order; the next one is taken even where one fails.
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
    """The outcomes, one for each step, when all are done."""
    try:
        out, err = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return [Answer(**answer) for answer in json.loads(out.splitlines()[-1])]


def run_elsewhere(
    *steps: list[Any] | tuple[Any, ...], home: Path, address: str = NOWHERE, offline: bool = False, **environment: str
) -> list[Answer]:
    """Take the steps and wait; arguments as for :func:`start_elsewhere`."""
    return finish(start_elsewhere(*steps, home=home, address=address, offline=offline, **environment))


# ----------------------------------------------------------------------------------------------- in the other process


def load(source: str) -> str:
    """A backbone's fingerprint."""
    from cmap_defense.backbones.load import load_backbone
    from tiny import fingerprint

    return fingerprint(load_backbone(source))


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


def name(given: str, url: str) -> None:
    """Name a tiny official file."""
    from cmap_defense.backbones.registry import register
    from tiny import tiny_entry, tiny_file

    register(tiny_entry(given, tiny_file(url)))


def die_in_conversion() -> None:
    """Let the process be killed when half of the converted weights are written."""
    from cmap_defense.backbones import folder

    def write_half(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    folder.write_safetensors = write_half


STEPS = {step.__name__: step for step in (load, cli, environ, hurry, name, die_in_conversion)}


class Copied(io.StringIO):
    """What is printed to standard error, which is printed there too."""

    def write(self, text: str) -> int:
        os.write(2, text.encode())
        return super().write(text)


def main(steps: list[list[Any]]) -> None:
    """Take the steps and print the outcomes."""
    answers = []
    for step, *arguments in steps:
        out, err = io.StringIO(), Copied()
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
