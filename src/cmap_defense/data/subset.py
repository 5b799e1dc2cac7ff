"""Which images of a data set are used, as settings."""

from __future__ import annotations

import dataclasses

from cmap_defense.common.settings import Settings, setting
from cmap_defense.errors import SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset(Settings):
    """Which images of a data set are used.

    Args:
        count: number of images; None for all.
        order: "first"; "last", in their order: of a training split that is no folder what ``train --hold-out`` left
            out; or "random" for ``numpy.random.RandomState(seed).choice`` without replacement, in the order drawn, as
            in the paper's scripts.
        seed: of that draw, below 2^32.

    Raises:
        SettingsError: a value is out of its range.
    """

    count: int | None = setting(None, "Number of images to take from the data set.", minimum=1)
    order: str = setting(
        "first",
        'Which images to take. With --split train, "last" takes those that "train --hold-out" left out of data that '
        "are no folder.",
        choices=("first", "last", "random"),
    )
    seed: int = setting(0, "Seed of the random draw of images.", minimum=0, below=2**32)

    def indices(self, total: int) -> list[int]:
        """Positions in a data set of ``total`` images. Raises ``SettingsError`` where it has too few, or none."""
        count = total if self.count is None else self.count
        if not 1 <= count <= total:
            remedy = f" Take {total} at most: Subset(count={total})." if total else ""
            raise SettingsError(f"{count} images are to be used, but the data set has {total}.{remedy}")
        if self.order == "first":
            return list(range(count))
        if self.order == "last":
            return list(range(total - count, total))
        import numpy as np  # here, so that the settings alone can be imported without it

        return np.random.RandomState(self.seed).choice(total, count, replace=False).tolist()
