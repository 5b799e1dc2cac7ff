"""Write the cards of the published backbones in the registry to docs/backbones/, from their records alone.

    python docs/cards.py

The cards are committed, so that they can be read anywhere; a test says when they are out of date. The backbones that
are in the package have pages that are written by hand.
"""

from pathlib import Path

from cmap_defense.backbones import LocalFolder, backbone_names, registry_entry
from cmap_defense.backbones.remote.card import entry_card

FOLDER = Path(__file__).parent / "backbones"

TABLE = """# All backbones

Every name that `load_backbone` and `backbone=` know. A heading sorts the table.
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
        source = "the package" if isinstance(entry.sources[0], LocalFolder) else "a server"
        cells = [f"[`{entry.name}`]({entry.name}.md)", size, str(entry.num_classes or ""), entry.kind, source]
        rows.append(f"| {' | '.join(cells)} | {entry.description} |")
    published = {f"{e.name}.md": entry_card(e) for e in entries if not isinstance(e.sources[0], LocalFolder)}
    return published | {"all.md": TABLE + "\n".join(rows) + "\n\n</div>\n"}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in cards().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
