"""How much slower is the command line where another process wants a core?

``python benchmarks/busy_cores.py`` runs ``cmap-defense demo`` on the cores as they are, and again beside processes that
compute without end, and prints the ratio of the times; with more than ``--limit`` the exit status is 1. ``--spinning``
does the same with threads that spin while they wait, as torch's do by themselves.

Run it on idle cores: other work slows the first run down too, and the ratio then says nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import click

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINNING = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""What the two OpenMP libraries that torch comes with do when no variable is set."""


BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Computes until the process that started it ends."""


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes that compute all the time."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def seconds(images: int, iterations: int, variables: dict[str, str]) -> float:
    """Of one demonstration, without the import of torch."""
    environment = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
    sizes = ["--purifier", "cmap", "--images", str(images), "--iterations", str(iterations)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cmap_defense", "demo", *sizes, "--json", "--out", folder]
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["seconds"])


@click.command()
@click.option("--images", default=24, show_default=True, help="Number of images of the demo.")
@click.option("--iterations", default=200, show_default=True, help="Iterations of the latent optimisation.")
@click.option("--processes", default=1, show_default=True, help="Number of processes beside it.")
@click.option("--repeats", default=3, show_default=True, help="Number of runs; the median counts.")
@click.option("--spinning", is_flag=True, help="Measure threads that spin while they wait, too.")
@click.option("--limit", default=3.0, show_default=True, help="Largest ratio that is all right.")
def main(images: int, iterations: int, processes: int, repeats: int, spinning: bool, limit: float) -> None:
    """Compare times on idle and on busy cores."""
    load = os.getloadavg()[0]
    click.echo(f"{os.cpu_count()} cores, load {load:.1f} before the start; {processes} process(es) beside the demo.")
    ratios = []
    for name, variables in (("as it is", {}), ("spinning", SPINNING))[: 1 + spinning]:
        idle, beside = [], []
        for _ in range(repeats):
            idle.append(seconds(images, iterations, variables))
            with busy(processes):
                beside.append(seconds(images, iterations, variables))
        ratios.append(statistics.median(beside) / statistics.median(idle))
        click.echo(
            f"{name}: {statistics.median(idle):.1f} s, beside {statistics.median(beside):.1f} s, ratio {ratios[-1]:.2f}"
        )
    sys.exit(ratios[0] > limit)


if __name__ == "__main__":
    main()
