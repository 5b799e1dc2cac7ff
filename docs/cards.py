"""Write the card of every backbone in the registry to docs/backbones/, from its record alone.

    python docs/cards.py

The cards are committed, so that they can be read anywhere; a test says when they are out of date.
"""

from pathlib import Path

from cmap_defense.backbones import backbone_names, registry_entry
from cmap_defense.backbones.remote.card import entry_card

FOLDER = Path(__file__).parent / "backbones"


def cards() -> dict[str, str]:
    """File name to contents, for every name."""
    return {f"{name}.md": entry_card(registry_entry(name)) for name in backbone_names()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        if old.name != "index.md":
            old.unlink()
    for file, text in cards().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
