"""The command ``cmap-defense``: exit status 0 when done, 1 on an error, 2 on wrong usage, 130 on Ctrl-C."""

from __future__ import annotations

import os
import sys
import warnings

import click

from cmap_defense.cli.command import Group
from cmap_defense.cli.commands import ALL

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""What OpenMP's threads do while they wait: sleep, in GNU's library (Linux) after some microseconds of spinning."""


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="cmap-defense", prog_name="cmap-defense")
def cli() -> None:
    """Consistency-model adversarial purification (CMAP) for image classifiers."""


for command in ALL:
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        status = cli.main(arguments, prog_name="cmap-defense", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OSError as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    return status if isinstance(status, int) else 0


def run() -> None:
    """The console script, and ``python -m cmap_defense``."""
    wait_passively()
    warnings.formatwarning = format_warning
    sys.exit(main())


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package as one sentence, without a line of its code; others as Python shows them."""
    if category.__module__.startswith("cmap_defense."):
        return f"Warning: {message}\n"
    text = "" if line is None else f"  {line.strip()}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n{text}"


def wait_passively() -> None:
    """Let torch's threads sleep, rather than spin, while they wait for each other, unless the environment decides it.

    Threads that spin take the cores from those that they wait for as soon as another process wants a core too: two
    threads are then several times slower than one. OpenMP reads these variables when torch is imported, so this comes
    first; results do not depend on them.
    """
    if not {*WAITING, "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ.update(WAITING)
