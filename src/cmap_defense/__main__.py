"""``python -m cmap_defense``."""

import sys

from cmap_defense.cli.main import main

sys.exit(main())
