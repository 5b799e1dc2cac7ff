"""Write the cards of the published backbones in the registry to docs/backbones/, from their records alone.

    python docs/cards.py

The cards are committed, so that they can be read anywhere; a test says when they are out of date. The backbones that
are in the package have pages that are written by hand.
"""

from pathlib import Path

from cmap_defense.backbones import (
    HubRepository,
    LocalFolder,
    OfficialFile,
    RegistryEntry,
    backbone_names,
    registry_entry,
)
from cmap_defense.backbones.registry.entry import Source
from cmap_defense.backbones.remote.card import (
    figure_lines,
    settings_lines,
    table,
    use_lines,
)

FOLDER = Path(__file__).parent / "backbones"

TABLE = """# All backbones

Every name that `load_backbone` and `backbone=` know. Click a heading to sort the table.
[Choose a backbone](index.md) says which one to take.

<div class="sortable" markdown>

| name | images | classes | kind | from | |
| --- | --- | --- | --- | --- | --- |
"""


def cards() -> dict[str, str]:
    """File name to contents: of every name that is fetched, and of the table of all names."""
    entries = [registry_entry(name) for name in backbone_names()]
    rows = []
    for entry in entries:
        size = "\u00a0×\u00a0".join(map(str, entry.image_shape))
        source = (
            "the package"
            if isinstance(entry.sources[0], LocalFolder)
            else "a server"
        )
        cells = [
            f"[`{entry.name}`]({entry.name}.md)",
            size,
            str(entry.num_classes or ""),
            entry.kind,
            source,
        ]
        rows.append(f"| {' | '.join(cells)} | {entry.description} |")
    published = {
        f"{e.name}.md": entry_card(e)
        for e in entries
        if not isinstance(e.sources[0], LocalFolder)
    }
    return published | {"all.md": TABLE + "\n".join(rows) + "\n\n</div>\n"}


def entry_card(entry: RegistryEntry) -> str:
    """The page of a name, in Markdown."""
    lines = [f"# {entry.name}", "", entry.description, ""]
    if entry.notes:
        lines += [entry.notes, ""]
    lines += table(entry)
    lines += [
        f"| verified | {'yes' if entry.verified else '**no**: no checksum of these weights has been recorded'} |",
        "",
    ]
    lines += ["## Where it comes from", ""]
    lines += [
        line
        for source in entry.sources
        for line in (*_source_lines(source), "")
    ]
    lines += use_lines(entry, entry.name)
    if entry.kind == "consistency" and entry.num_classes is not None:
        lines += [
            "The backbone is class-conditional. By default each image is purified under the classifier's top label "
            "on the input; for an attacked image that is the attacker's label. "
            "`PurifiedClassifier(..., class_labels=...)` has the other choices, and the result says which labels "
            "were used.",
            "",
        ]
    lines += settings_lines(entry)
    return "\n".join([*lines, *figure_lines(entry.quality)]).rstrip() + "\n"


def _source_lines(source: Source) -> list[str]:
    if isinstance(source, LocalFolder):
        return [
            "- A folder: one that comes with the package, or one on this machine."
        ]
    if isinstance(source, HubRepository):
        revision = (
            f"commit `{source.revision}`"
            if source.revision
            else "**no commit pinned**: the newest"
        )
        return [
            f"- The Hub's [{source.repo_id}](https://huggingface.co/{source.repo_id}), {revision}.",
            f"- SHA-256 of the weights: {_known(source.sha256)}.",
        ]
    assert isinstance(source, OfficialFile)
    size = (
        f"{source.size:,} bytes"
        if source.size
        else f"about {source.about.partition(',')[0]}"
    )
    return [
        f"- The authors' own file, `{source.url}` ({size}), converted once on this machine (`{source.params}`).",
        f"- SHA-256 of the file: {_known(source.sha256)}.",
    ]


def _known(checksum: str | None) -> str:
    return (
        f"`{checksum}`"
        if checksum
        else "not recorded; `cmap-defense backbones verify` records it on your machine, and refuses other files then"
    )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in cards().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
