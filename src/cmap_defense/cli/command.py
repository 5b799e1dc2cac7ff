"""Commands: help in groups with whole summaries, and errors that speak of options."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import click

from cmap_defense.errors import CmapError

OTHER = "Other options"

Decorator = Callable[[Any], Any]


class _Option(click.Option):
    """An option in a group of the help, which shows its default."""

    def __init__(self, *names: Any, group: str, **attributes: Any) -> None:
        if attributes.get("default") not in (None, "", False):
            attributes.setdefault("show_default", True)
        super().__init__(*names, **attributes)
        self.group = group


def in_group(group: str) -> Callable[..., Decorator]:
    """``click.option`` for the options of one group of the help, such as "Data"."""
    return functools.partial(click.option, cls=_Option, group=group)


def decorators(*options: Decorator) -> Decorator:
    """Several options as one decorator, in this order in the help."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


class _Grouped(click.Command):
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


class Command(_Grouped):
    """A command with grouped options."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its errors name options in place of Python's arguments."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if type(error) is click.UsageError:
                raise click.UsageError(_with_options(error.message, self.params), ctx) from error
            error.ctx = ctx
            raise
        except CmapError as error:
            raise click.ClickException(_with_options(str(error), self.params)) from error


class Group(_Grouped, click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its own options, then its commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def _with_options(message: str, parameters: Sequence[click.Parameter]) -> str:
    """A message with ``--eps`` for ``ThreatModel.eps`` and ``--count 5`` for ``Subset(count=5)``, where it is one."""
    names = {option.name: max(option.opts, key=len) for option in parameters if isinstance(option, click.Option)}

    def option(match: re.Match[str]) -> str:
        return " ".join([names[match[1]], *match.groups()[1:]]) if match[1] in names else match[0]

    message = re.sub(r"\b[A-Z]\w+\((\w+)=([\w.]+)\)", option, message)
    return re.sub(r"\b[A-Z]\w+\.(\w+)\b", option, message)
