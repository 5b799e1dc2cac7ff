"""``cmap-defense backbones``: which there are, what is known of each, and getting, making, checking, sharing them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from cmap_defense.backbones.convert import convert_jcm, convert_openai
from cmap_defense.backbones.folder import RECORD_FILE, read_record, write_backbone
from cmap_defense.backbones.karras import EDMDenoiser, KarrasModel
from cmap_defense.backbones.load import entry_of, resolve_backbone
from cmap_defense.backbones.ncsnpp import NCSNppConfig
from cmap_defense.backbones.registry import backbone_names, registry_entry
from cmap_defense.backbones.remote.cache import pinned
from cmap_defense.backbones.verify import push_backbone, verify_backbone
from cmap_defense.backbones.weights import DTYPES, sha256_of, weights_files
from cmap_defense.cli.build import Printed, refuse
from cmap_defense.common.tables import table_lines
from cmap_defense.errors import SettingsError


def list_backbones(options: dict[str, Any]) -> Printed:
    """Carry out the command backbones list."""
    entries = [pinned(registry_entry(name)) for name in backbone_names()]
    rows = [["name", "kind", "image", "classes", "verified", "what it is"]]
    for entry in entries:
        classes = "-" if entry.num_classes is None else str(entry.num_classes)
        shape = "x".join(map(str, entry.image_shape))
        rows.append([entry.name, entry.kind, shape, classes, "yes" if entry.verified else "no", entry.description])
    note = "\nverified: its commit and checksum are known. `cmap-defense backbones verify NAME` fills them in."
    return [entry.to_dict() for entry in entries], [*table_lines(rows), note]


def show_backbone(options: dict[str, Any]) -> Printed:
    """Carry out the command backbones info."""
    entry = entry_of(options["backbone"])
    if entry is not None:
        values = pinned(entry).to_dict()
    else:
        folder = resolve_backbone(options["backbone"], weights=False)
        values = read_record(folder).to_dict() | {"folder": str(folder)}
    return values, [line for name, value in values.items() for line in _shown(name, value)]


def pull_backbone(options: dict[str, Any]) -> Printed:
    """Carry out the command backbones pull."""
    backbone = options["backbone"]
    folder = resolve_backbone(backbone, force=options["force"])
    weights = folder / read_record(folder).weights_file
    size = sum(file.stat().st_size for file in weights_files(weights))
    values = {"backbone": backbone, "folder": str(folder), "weights": str(weights), "bytes": size}
    return values, [f"{backbone} is in {folder} ({size / 2**20:,.1f} MiB of weights)."]


def convert_checkpoint(options: dict[str, Any]) -> Printed:
    """Carry out the command backbones convert."""
    checkpoint, out, image_size = options["checkpoint"], options["out"], options["image_size"]
    source: dict[str, Any] = {"file": checkpoint.name, "converter": options["format_"]}
    if options["format_"] == "jcm":
        if image_size is not None:
            raise click.BadParameter("goes with --from openai; say --config image_size=N.", param_hint="--image-size")
        refuse("head_channels", "goes with --from openai: leave the option out.")
        model: KarrasModel = convert_jcm(checkpoint, _config(options["config"]), options["params"])
        source["params"] = options["params"]
    else:
        if options["config"]:
            raise click.BadParameter(
                "the architecture of --from openai is read off the file: leave the option out.", param_hint="--config"
            )
        refuse("params", "goes with --from jcm: leave the option out.")
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
    said = f"Wrote {out / record.weights_file} and {out / RECORD_FILE}. Load it with load_backbone({str(out)!r})."
    return record.to_dict() | {"folder": str(out)}, [said]


def verify_and_show(options: dict[str, Any]) -> Printed:
    """Carry out the command backbones verify."""
    found = verify_backbone(options["backbone"]).to_dict()
    lines = [line for name, value in found.items() if value is not None for line in _shown(name, value)]
    return found, [*lines, f"{options['backbone']} is whole and works."]


def push_folder(options: dict[str, Any]) -> Printed:
    """Carry out the command backbones push."""
    pushed = push_backbone(**{name: options[name] for name in ("folder", "repo_id", "private", "message")})
    return {"backbone": pushed}, [f"Pushed. Load it with load_backbone({pushed!r})."]


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


def _shown(name: str, value: object, space: str = "") -> list[str]:
    """One line per value, nested objects indented below their name."""
    if isinstance(value, dict):
        return [f"{space}{name}:", *(line for part in value.items() for line in _shown(*part, space + "  "))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [line for number, item in enumerate(value, 1) for line in _shown(f"{name} {number}", item, space)]
    if isinstance(value, list):
        return [f"{space}{name}: {', '.join(map(str, value))}"]
    words = "yes" if value is True else "no" if value is False else "-" if value in (None, "") else value
    return [f"{space}{name}: {words}"]
