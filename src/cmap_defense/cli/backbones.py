"""``cmap-defense backbones``: which there are, and what is known of each."""

from __future__ import annotations

import click

from cmap_defense.backbones.folder import read_record
from cmap_defense.backbones.load import resolve_backbone
from cmap_defense.backbones.registry import backbone_names, registry_entry
from cmap_defense.cli.output import json_option, print_json, print_table

__all__ = ["backbones"]


@click.group()
def backbones() -> None:
    """List backbones and show what is known of them."""


@backbones.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the backbones that have a name."""
    records = [registry_entry(name).record for name in backbone_names()]
    if as_json:
        print_json([record.to_dict() for record in records])
        return
    rows = [["name", "image", "licence", "what it is"]]
    rows += [[r.name, "x".join(map(str, r.image_shape)), r.licence, r.description] for r in records]
    print_table(rows)


@backbones.command()
@click.argument("backbone")
@json_option
def info(backbone: str, as_json: bool) -> None:
    """Show the record of BACKBONE: a name, a folder or a Hub id."""
    folder = resolve_backbone(backbone)
    record = read_record(folder)
    if as_json:
        print_json(record.to_dict() | {"folder": str(folder)})
        return
    for name, value in (record.to_dict() | {"folder": str(folder)}).items():
        _show(name, value, indent=0)


def _show(name: str, value: object, *, indent: int) -> None:
    """One line per value, nested objects indented below their name."""
    space = "  " * indent
    if isinstance(value, dict):
        click.echo(f"{space}{name}:")
        for inner, content in value.items():
            _show(str(inner), content, indent=indent + 1)
    else:
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        click.echo(f"{space}{name}: {shown}")
