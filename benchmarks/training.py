"""How many images per second does the trainer see, compared with another commit?

``python benchmarks/training.py --against 688c910`` trains the networks of both packaged models for a few steps, with
the trainer of this checkout and with that of the other commit (in a temporary git worktree), in turn, and prints
images per second of each and their ratio. Every measurement is two trainings of different lengths; their difference is
the time of the steps alone, without start-up, compilation and the last checkpoint. Options after ``--`` go to both
trainers, such as ``-- --precision float32``.

``--clock cpu`` counts the processor time of the trainings instead of the time that passes, for a machine that does
other work too. The ratios are medians over the rounds. The speeds depend on the machine.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[1]

NETWORKS = {
    "fashion-mnist": ((28, 28, 1), ["--channels", "32,64", "--attention", "1"]),
    "cifar10": ((32, 32, 3), ["--channels", "48,96", "--attention", "1"]),
}
"""Image shape and options of the network of each packaged model."""


def processor_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": processor_seconds}


def seconds(source: Path, data: Path, images: int, options: list[str], clock: Callable[[], float]) -> float:
    """Seconds that the trainer of ``source`` takes for a training of ``images`` images, start-up included."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "cmap_defense", "train", "--data", str(data), "--images", str(images)]
        begun = clock()
        done = subprocess.run(
            [*command, "--out", out, *options],
            env=os.environ | {"PYTHONPATH": str(source)},
            capture_output=True,
            text=True,
        )
        spent = clock() - begun
    if done.returncode:
        raise click.ClickException(f"The training of {source} failed:\n{done.stderr}")
    return spent


@click.command()
@click.option("--against", default="688c910", show_default=True, help="Commit to compare with.")
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), help="[default: both]")
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(1), help="Images in one step.")
@click.option("--steps", default=6, show_default=True, type=click.IntRange(1), help="Steps that are timed.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Measurements of each trainer.")
@click.option("--clock", default="wall", show_default=True, type=click.Choice(list(CLOCKS)), help="What is counted.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    against: str,
    networks: tuple[str, ...],
    batch_size: int,
    steps: int,
    rounds: int,
    clock: str,
    options: tuple[str, ...],
) -> None:
    """Compare the speed of the trainer with that of another commit."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(other), against], cwd=ROOT, check=True)
        try:
            for name in networks or NETWORKS:
                shape, of_network = NETWORKS[name]
                data = Path(folder) / f"{name}.npz"
                images = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), dtype=np.uint8)
                np.savez(data, images=images)
                given = [*of_network, "--batch-size", str(batch_size), *options]
                speeds: dict[str, list[float]] = {against: [], "this checkout": []}
                for _ in range(rounds):
                    for trainer, source in ((against, other / "src"), ("this checkout", ROOT / "src")):
                        short, long = (
                            seconds(source, data, batch_size * count, given, CLOCKS[clock]) for count in (1, 1 + steps)
                        )
                        speeds[trainer].append(steps * batch_size / max(long - short, 1e-9))
                ratio = statistics.median(
                    new / old for old, new in zip(speeds[against], speeds["this checkout"], strict=True)
                )
                for trainer, found in speeds.items():
                    click.echo(f"{name}  {trainer:14} {statistics.median(found):8.1f} images/s ({clock} time)")
                click.echo(f"{name}  ratio {ratio:.2f}")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
