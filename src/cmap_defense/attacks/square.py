"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049), by the library of AutoAttack."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.libraries import NORMS, LibraryModel, pyautoattack
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.errors import InputValueError
from cmap_defense.settings import require_integer, require_number
from cmap_defense.threat import ThreatModel

__all__ = ["Square", "require_tiles"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Random search: a square of the image changes, and stays changed where the margin improves. No gradient.

    It is the search of pyautoattack's ``SquareAttack``, the extra ``[attacks]``. What it lowers is ours: the margin of
    the mean probability over ``samples`` evaluations with noise of their own (EOT), towards targets too where there are
    any. All images are attacked, those too that a random model gets wrong at first.

    The best is the highest of many noisy answers and so partly luck: the more ``samples``, the less of it. The
    squares come from one stream for the batch: unlike in the rest of the suite, an image's outcome depends on the batch
    that it is in. One image per call is the way around it.

    Args:
        queries: changes tried, each ``samples`` evaluations of the model; and one for the start.
        samples: evaluations that an answer is averaged over.
        p_init: share of the pixels in the first squares; it falls on the paper's schedule (section 3), stretched to
            ``queries``.
        confidence: the margin at which an image is left alone, 0 for the first success as in the paper; None goes on to
            the last query, as an answer of a random model may be luck.

    Other arguments: :class:`~cmap_defense.attacks.base.Attack`.

    history: "margin", the highest averaged one so far, at the start and after each change.

    Raises:
        SettingsError: a value is out of its range.
        InputValueError: l2, and images of a size that the library's start does not fit on.
        MissingExtraError: pyautoattack is not installed.
    """

    queries: int = 1000
    samples: int = 4
    p_init: float = 0.8
    confidence: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("Square", "queries", self.queries, minimum=1)
        require_integer("Square", "samples", self.samples, minimum=1)
        require_number("Square", "p_init", self.p_init, above=0.0, maximum=1.0)
        if self.confidence is not None:
            require_number("Square", "confidence", self.confidence, minimum=0.0)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        require_tiles(self.threat, clean)
        highest, history = torch.full((len(clean),), -torch.inf, device=clean.device), []

        def lacking(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            """What the search takes for the margin left, above 0 for more of it, and the loss that it lowers."""
            model = LibraryModel(oracle.rows(rows).averaged(self.samples), clean)
            ahead = margin(model(images), goal.rows(rows))
            highest[rows] = torch.maximum(highest[rows], ahead)
            history.append(highest.clone())
            return (torch.ones_like(ahead) if self.confidence is None else self.confidence - ahead), -ahead

        attack = pyautoattack().square.SquareAttack(
            None,
            norm=NORMS[self.threat.norm],
            n_queries=self.queries,
            eps=self.threat.eps,
            p_init=self.p_init,
            resc_schedule=True,
            device=clean.device,
        )
        # In place of the library's: it writes into the logits, has no targets together with labels, and does not know
        # which images it is shown, of which noise hangs. It is given positions in the batch as labels instead.
        attack.margin_and_loss = lacking
        images = clean.float().contiguous()
        attack.init_hyperparam(images)
        _, found = attack.attack_single_run(images, torch.arange(len(clean), device=clean.device))
        return Candidates(found[:, None], {"margin": torch.stack(history)})


def require_tiles(threat: ThreatModel, images: Tensor) -> None:
    """Raises :class:`InputValueError` where the library's start in l2, a grid of squares, does not fit on the images.

    Its squares have a fifth of the height for a side, and it counts as many of them as fit beginning at 0, but begins
    further in.
    """
    height, width = images.shape[2:]
    side = height // 5
    begin = (height - 5 * side) // 2
    fits = side == 1 or (side > 1 and all(begin + length // side * side <= length for length in (height, width)))
    if threat.norm == "l2" and not fits:
        raise InputValueError(
            f"Square Attack in l2 starts from a grid of squares, which pyautoattack cannot lay on images of "
            f"{height} x {width}. Use linf, or SPSA."
        )
