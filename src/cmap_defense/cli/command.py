"""Commands: help in groups with whole summaries, errors that speak of options, and what a command prints."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
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
    """``click.option`` for the options of one group of the help, such as "Data", given by names and the help text.

    Beside those of click there are ``least``, of an integer, and ``unset``, what the help shows for the default None.
    """

    def option(*names: str, least: int | None = None, unset: str | None = None, **attributes: Any) -> Decorator:
        if least is not None:
            attributes["type"] = click.IntRange(least)
        if unset is not None:
            attributes["show_default"] = unset
        return click.option(*names[:-1], cls=_Option, group=group, help=names[-1], **attributes)

    return option


def decorators(*options: Decorator) -> Decorator:
    """Several options as one decorator, in this order in the help."""
    return lambda command: functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def command(runs: str, text: str, *options: Decorator, name: str | None = None, **defaults: Any) -> Command:
    """A command that calls a function of this package with its options, and prints the JSON or the text it returns.

    Args:
        runs: where the function is, such as "train:run_train". Its module is imported when it runs.
        text: the help.
        options: those of the command; ``--json`` joins them.
        name: of the command; None for that of the module.
        defaults: of options, in place of their own; the help then shows defaults of all kinds.
    """
    module, _, function = runs.partition(":")

    def callback(**given: Any) -> None:
        run = getattr(importlib.import_module(f"cmap_defense.cli.{module}"), function)
        from cmap_defense.common.modules import using_threads  # here, so that help needs no torch

        with using_threads(given.get("threads")):
            found = run(given)
        if found is not None:
            values, lines = found
            click.echo(json.dumps(values, indent=2, allow_nan=False) if given["as_json"] else "\n".join(lines))

    as_json = in_group("Output")("--json", "as_json", "Print one JSON object instead of text.", is_flag=True)
    settings = {"default_map": defaults, "show_default": True} if defaults else {}
    made = click.command(name or module, cls=Command, help=inspect.cleandoc(text), context_settings=settings)
    return made(decorators(*options, as_json)(callback))


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

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its own options, then its commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def _with_options(message: str, parameters: Sequence[click.Parameter]) -> str:
    """A message with ``--eps`` for ``ThreatModel.eps`` and ``--count 5`` for ``Subset(count=5)``, where it is one."""
    names = {option.name: max(option.opts, key=len) for option in parameters if isinstance(option, click.Option)}

    def option(match: re.Match[str]) -> str:
        return " ".join([names[match[1]], *match.groups()[1:]]) if match[1] in names else match[0]

    message = re.sub(r"\b[A-Z]\w+\((?:\.\.\., )?(\w+)=\"?([\w.]+)\"?\)", option, message)
    return re.sub(r"\b[A-Z]\w+\.(?:normalize )?(\w+)\b", option, message)
