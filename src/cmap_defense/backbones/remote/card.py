"""Model cards: what a reader should know about a backbone, from its record alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.registry.entry import RegistryEntry

_HUB_LICENCES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0")
"""Licences that the Hub knows by these names."""

_KINDS = {"consistency": "consistency model", "denoiser": "denoiser"}

_USE = """```python
from cmap_defense import PurifiedClassifier

model = PurifiedClassifier(classifier, "{source}")
logits = model(images)  # [B, {channels}, {height}, {width}] in [0, 1]
```
"""
_DENOISER_USE = """It denoises, and has no one-step generator, so CMAP takes it only with `CMAPSettings(level=...)`.

```python
from cmap_defense import load_backbone

denoiser = load_backbone("{source}")
clean = denoiser.denoise(noisy, sigma)
```
"""


def hub_card(record: BackboneRecord, repo_id: str) -> str:
    """The README of a repository that holds a backbone folder: the Hub's metadata, then the page."""
    head = ["---", "library_name: cmap-defense"]
    head += [] if record.num_classes else ["pipeline_tag: unconditional-image-generation"]
    head += ["tags:", f"- {_KINDS[record.kind].replace(' ', '-')}", "- adversarial-purification"]
    licence = record.licence.lower()
    if licence in _HUB_LICENCES:
        head += [f"license: {licence}"]
    elif licence:
        head += ["license: other", f"license_name: {re.sub(r'[^a-z0-9.]+', '-', licence).strip('-')}"]
    lines = [*head, "---", "", f"# {record.name}", ""]
    lines += [record.description, ""] if record.description else []
    lines += table(record)
    lines += [f"| network | {record.network} |", f"| weights | {record.weights_file}, {record.weights_dtype} |"]
    lines += [f"| SHA-256 | `{record.weights_sha256}` |", "", *use_lines(record, repo_id)]
    lines += settings_lines(record)
    for title, values in (("Where the weights come from", record.source), ("Training", record.training)):
        if values:
            lines += [f"## {title}", "", *_bullets(values), ""]
    return "\n".join([*lines, *figure_lines(record.figures)]).rstrip() + "\n"


def use_lines(of: RegistryEntry | BackboneRecord, source: str) -> list[str]:
    """How it is loaded by what ``source`` names it."""
    channels, height, width = of.image_shape
    text = _USE if of.kind == "consistency" else _DENOISER_USE
    return ["## Use", "", text.format(source=source, channels=channels, height=height, width=width)]


def table(of: RegistryEntry | BackboneRecord) -> list[str]:
    """The first rows of a card's table."""
    classes = "unconditional" if of.num_classes is None else f"class-conditional, {of.num_classes} classes"
    return [
        "| | |",
        "| --- | --- |",
        f"| images | {' x '.join(map(str, of.image_shape))}, {classes} |",
        f"| kind | {_KINDS[of.kind]} |",
        f"| licence of the weights | {of.licence or 'not stated'} |",
        f"| paper | {of.paper or 'not stated'} |",
    ]


def settings_lines(of: RegistryEntry | BackboneRecord) -> list[str]:
    """The CMAP settings of a consistency model."""
    if of.kind != "consistency":
        return []
    shown = [f"`{name} = {format(v, 'g') if isinstance(v, float) else v}`" for name, v in of.settings.items()]
    return ["## Settings", "", f"CMAP settings, as changes to the defaults: {', '.join(shown) or 'none'}.", ""]


def figure_lines(figures: Mapping[str, Any]) -> list[str]:
    """What was measured or cited."""
    return ["## Quality", "", *(_bullets(figures) or ["No figure is measured or cited here."]), ""]


def _bullets(values: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        title = f"{indent}- {str(name).replace('_', ' ')}:"
        if isinstance(value, Mapping):
            lines += [title, *_bullets(value, f"{indent}    ")]
        else:
            lines.append(f"{title} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return lines
