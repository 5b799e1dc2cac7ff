"""``cmap-defense backbones``: which there are, what is known of each, and getting, making, checking, sharing them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from cmap_defense.backbones.convert import convert_jcm, convert_openai
from cmap_defense.backbones.folder import RECORD_FILE, read_record, write_backbone
from cmap_defense.backbones.karras import EDMDenoiser, KarrasModel
from cmap_defense.backbones.load import entry_of, resolve_backbone
from cmap_defense.backbones.ncsnpp import NCSNppConfig
from cmap_defense.backbones.push import push_backbone
from cmap_defense.backbones.registry import backbone_names, registry_entry
from cmap_defense.backbones.remote.cache import pinned
from cmap_defense.backbones.shards import weights_files
from cmap_defense.backbones.verify import verify_backbone
from cmap_defense.backbones.weights import DTYPES, sha256_of
from cmap_defense.cli.output import print_json, print_table
from cmap_defense.errors import SettingsError


def list_backbones(*, as_json: bool) -> None:
    """Carry out the command backbones list."""
    entries = [pinned(registry_entry(name)) for name in backbone_names()]
    if as_json:
        print_json([entry.to_dict() for entry in entries])
        return
    rows = [["name", "image", "classes", "verified", "what it is"]]
    rows += [
        [
            entry.name,
            "x".join(map(str, entry.image_shape)),
            "-" if entry.num_classes is None else str(entry.num_classes),
            "yes" if entry.verified else "no",
            entry.description,
        ]
        for entry in entries
    ]
    print_table(rows)
    click.echo("\nverified: its commit and checksum are known. `cmap-defense backbones verify NAME` fills them in.")


def show_backbone(backbone: str, *, as_json: bool) -> None:
    """Carry out the command backbones info."""
    entry = entry_of(backbone)
    if entry is not None:
        values = pinned(entry).to_dict()
    else:
        folder = resolve_backbone(backbone, weights=False)
        values = read_record(folder).to_dict() | {"folder": str(folder)}
    if as_json:
        print_json(values)
        return
    for name, value in values.items():
        _show(name, value, indent=0)


def pull_backbone(backbone: str, *, force: bool, as_json: bool) -> None:
    """Carry out the command backbones pull."""
    folder = resolve_backbone(backbone, force=force)
    record = read_record(folder)
    weights = folder / record.weights_file
    size = sum(file.stat().st_size for file in weights_files(weights))
    if as_json:
        print_json({"backbone": backbone, "folder": str(folder), "weights": str(weights), "bytes": size})
        return
    click.echo(f"{backbone} is in {folder} ({size / 2**20:,.1f} MiB of weights).")


def convert_checkpoint(options: dict[str, Any]) -> None:
    """Carry out the command backbones convert with its options."""
    checkpoint, out, image_size = options["checkpoint"], options["out"], options["image_size"]
    source: dict[str, Any] = {"file": checkpoint.name, "converter": options["format_"]}
    if options["format_"] == "jcm":
        if image_size is not None:
            raise click.BadParameter("goes with --from openai; say --config image_size=N.", param_hint="--image-size")
        model: KarrasModel = convert_jcm(checkpoint, _config(options["config"]), options["params"])
        source["params"] = options["params"]
    else:
        if options["config"]:
            raise click.BadParameter(
                "the architecture of --from openai is read off the file: leave the option out.", param_hint="--config"
            )
        model = convert_openai(checkpoint, image_size=image_size, head_channels=options["head_channels"])
    if options["kind"] == "denoiser":
        model = EDMDenoiser(model.network, model.image_shape, model.noise, model.num_classes)
    source |= {"size": checkpoint.stat().st_size, "sha256": sha256_of(checkpoint)}
    record = write_backbone(
        model,
        out,
        dtype=DTYPES[options["weights"]],
        name=options["name"] or out.absolute().name,
        description=options["description"],
        licence=options["licence"],
        source=source,
    )
    if options["as_json"]:
        print_json(record.to_dict() | {"folder": str(out)})
        return
    click.echo(f"Wrote {out / record.weights_file} and {out / RECORD_FILE}. Load it with load_backbone({str(out)!r}).")


def verify_and_show(backbone: str, *, as_json: bool) -> None:
    """Carry out the command backbones verify."""
    found = verify_backbone(backbone)
    if as_json:
        print_json(found.to_dict())
        return
    for name, value in found.to_dict().items():
        if value is not None:
            _show(name, value, indent=0)
    click.echo(f"{backbone} is whole and works.")


def push_folder(folder: Path, repo_id: str, *, private: bool, message: str, as_json: bool) -> None:
    """Carry out the command backbones push."""
    pushed = push_backbone(folder, repo_id, private=private, message=message)
    if as_json:
        print_json({"backbone": pushed})
        return
    click.echo(f"Pushed. Load it with load_backbone({pushed!r}).")


def _config(changes: Iterable[tuple[str, Any]]) -> NCSNppConfig:
    """The CIFAR-10 architecture with changes."""
    default = NCSNppConfig()
    listed = {name for name, value in default.to_dict().items() if isinstance(value, list)}
    values = {name: [value] if name in listed and isinstance(value, int | float) else value for name, value in changes}
    values |= {name: [] for name, value in values.items() if name in listed and value == ""}
    try:
        return default.replace(**values)
    except SettingsError as error:
        raise click.BadParameter(str(error), param_hint="--config") from error


def _show(name: str, value: object, *, indent: int) -> None:
    """One line per value, nested objects indented below their name."""
    space = "  " * indent
    if isinstance(value, dict):
        click.echo(f"{space}{name}:")
        for inner, content in value.items():
            _show(str(inner), content, indent=indent + 1)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value, start=1):
            _show(f"{name} {number}", item, indent=indent)
    else:
        click.echo(f"{space}{name}: {_words(value)}")


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "yes" if value is True else "no" if value is False else "-" if value in (None, "") else str(value)
