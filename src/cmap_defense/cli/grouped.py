"""Commands whose help shows their options in groups, and whose summary is shown whole."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import click

__all__ = ["Command", "Group", "options_of"]

OTHER = "Other options"


class _Option(click.Option):
    """An option that belongs to a group of its command's help."""

    def __init__(self, *names: Any, group: str, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.group = group


def options_of(group: str) -> Callable[..., Callable[[Any], Any]]:
    """``click.option`` for the options of one group of the help, such as "Data"."""
    return functools.partial(click.option, cls=_Option, group=group)


class _Shown(click.Command):
    def get_short_help_str(self, limit: int = 45) -> str:
        """The first paragraph of the help, whatever its length."""
        return " ".join(inspect.cleandoc(self.help or "").split("\n\n")[0].split())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under the names of their groups, in the order in which groups first occur."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            shown = parameter.get_help_record(ctx)
            if isinstance(parameter, click.Option) and shown is not None:
                groups.setdefault(getattr(parameter, "group", OTHER), []).append(shown)
        groups[OTHER] = groups.pop(OTHER)  # there is always --help; it comes last
        for name, rows in groups.items():
            with formatter.section(name):
                formatter.write_dl(rows)


class Command(_Shown):
    """A command with grouped options."""


class Group(_Shown, click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its own options, then its commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
