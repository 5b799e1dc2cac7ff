"""The command ``cmap-defense``: exit status 0 when done, 1 on an error of ours, 2 on wrong usage, 130 on Ctrl-C."""

from __future__ import annotations

import sys

import click

from cmap_defense import __version__
from cmap_defense.cli.analyse import analyse
from cmap_defense.cli.backbones import backbones
from cmap_defense.cli.demo import demo
from cmap_defense.cli.evaluate import evaluate, report
from cmap_defense.cli.purify import purify
from cmap_defense.cli.quality import quality
from cmap_defense.cli.study import study
from cmap_defense.cli.train import train
from cmap_defense.errors import CmapError

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cmap-defense")
def cli() -> None:
    """Consistency-model adversarial purification (CMAP) for image classifiers."""


for command in (demo, purify, evaluate, report, study, analyse, quality, train, backbones):
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
    except CmapError as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    except OSError as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    return status if isinstance(status, int) else 0


def run() -> None:
    """The console script."""
    sys.exit(main())
