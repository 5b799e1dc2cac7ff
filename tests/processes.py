"""Processes of their own that begin with torch imported, since the import takes longer than most of what they do."""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from patience import HANGS

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torch.onnx", "torchvision", "huggingface_hub", "pytorch_msssim"])
"""What most scripts import, if only by their first optimiser; the package is not among it."""


def run_script(path: Path, *arguments: str, cwd: Path, **environment: str) -> str:
    """What ``python -W error path arguments`` prints."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        (status,) = run_together([(_script, path, arguments, cwd, os.environ | environment, out, err)])
        assert status == 0, err.read_text(encoding="utf-8")
        return out.read_text(encoding="utf-8")


def run_ranks(main: Callable[[Path], None], folder: Path) -> list[int | None]:
    """How two processes end that call ``main(folder)``, with the variables that torchrun would set for them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    variables = place | {"WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
    return run_together([(_rank, main, folder, variables | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"])


def run_together(calls: list[tuple[Any, ...]]) -> list[int | None]:
    """The exit statuses of processes that each call a function with arguments."""
    processes = [FORKS.Process(target=function, args=arguments) for function, *arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS)
        process.kill()
    return [process.exitcode for process in processes]


def _script(
    path: Path, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], out: Path, err: Path
) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(path), *arguments]
    sys.path[:] = [str(path.parent), *(entry for entry in sys.path if Path(entry) != Path(__file__).parent)]
    warnings.simplefilter("error")
    runpy.run_path(str(path), run_name="__main__")


def _rank(main: Callable[[Path], None], folder: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    signal.alarm(HANGS - 60)  # a rank that waits for another one
    main(folder)
