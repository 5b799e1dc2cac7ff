"""Model cards: what a reader should know about a backbone, from its record alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.registry.entry import RegistryEntry

_HUB_LICENCES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0")
"""Licences that the Hub knows by these names."""

USE = """```python
from cmap_defense import PurifiedClassifier

model = PurifiedClassifier(my_classifier, backbone="{source}")
logits = model(images)  # [B, {channels}, {height}, {width}] in [0, 1]
```
"""


def hub_card(record: BackboneRecord, repo_id: str) -> str:
    """The README of a repository that holds a backbone folder: the Hub's metadata, then the page."""
    tags = ["consistency-model" if record.kind == "consistency" else "denoiser", "adversarial-purification"]
    head = ["---", "library_name: cmap-defense"]
    head += [] if record.num_classes else ["pipeline_tag: unconditional-image-generation"]
    head += ["tags:", *(f"- {tag}" for tag in tags)]
    if record.licence.lower() in _HUB_LICENCES:
        head += [f"license: {record.licence.lower()}"]
    elif record.licence:
        head += ["license: other", f"license_name: {re.sub(r'[^a-z0-9.]+', '-', record.licence.lower()).strip('-')}"]
    lines = [*head, "---", "", f"# {record.name}", ""]
    lines += [record.description, ""] if record.description else []
    lines += [*table(record, record.licence, record.paper)]
    lines += [f"| network | {record.network} |", f"| weights | {record.weights_file}, {record.weights_dtype} |"]
    lines += [f"| SHA-256 | `{record.weights_sha256}` |", "", "## Use", ""]
    lines += [use(repo_id, record.image_shape) if record.kind == "consistency" else denoiser_use(repo_id)]
    lines += settings_lines(record.settings, record.kind)
    for title, values in (("Where the weights come from", record.source), ("Training", record.training)):
        if values:
            lines += [f"## {title}", "", *_bullets(values), ""]
    return "\n".join([*lines, *figure_lines(record.figures)]).rstrip() + "\n"


_KINDS = {"consistency": "consistency model", "denoiser": "denoiser"}


def use(source: str, shape: tuple[int, int, int]) -> str:
    return USE.format(source=source, channels=shape[0], height=shape[1], width=shape[2])


def denoiser_use(source: str) -> str:
    return (
        "It denoises, and has no one-step generator, so CMAP takes it only with `CMAPSettings(level=...)`.\n\n"
        "```python\n"
        "from cmap_defense import load_backbone\n\n"
        f'denoiser = load_backbone("{source}")\nclean = denoiser.denoise(noisy, sigma)\n```\n'
    )


def table(of: RegistryEntry | BackboneRecord, licence: str, paper: str) -> list[str]:
    classes = "unconditional" if of.num_classes is None else f"class-conditional, {of.num_classes} classes"
    return [
        "| | |",
        "| --- | --- |",
        f"| images | {' x '.join(map(str, of.image_shape))}, {classes} |",
        f"| kind | {_KINDS[of.kind]} |",
        f"| licence of the weights | {licence or 'not stated'} |",
        f"| paper | {paper or 'not stated'} |",
    ]


def settings_lines(settings: Mapping[str, Any], kind: str) -> list[str]:
    if kind != "consistency":
        return []
    shown = ", ".join(f"`{name} = {_number(value)}`" for name, value in settings.items())
    return ["## Settings", "", f"CMAP settings, as changes to the defaults: {shown or 'none'}.", ""]


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def figure_lines(figures: Mapping[str, Any]) -> list[str]:
    if not figures:
        return ["## Quality", "", "No figure is measured or cited here.", ""]
    return ["## Quality", "", *_bullets(figures), ""]


def _bullets(values: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        title = str(name).replace("_", " ")
        if isinstance(value, Mapping):
            lines += [f"{indent}- {title}:", *_bullets(value, f"{indent}    ")]
        elif isinstance(value, (list, tuple)):
            lines.append(f"{indent}- {title}: {', '.join(map(str, value))}")
        else:
            lines.append(f"{indent}- {title}: {value}")
    return lines
