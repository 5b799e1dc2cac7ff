"""``python -m cmap_defense``."""

from cmap_defense.cli.main import run

run()
