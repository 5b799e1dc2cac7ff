"""Square Attack, by the library of AutoAttack."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.libraries import NORMS, LibraryModel, pyautoattack
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.common.settings import setting
from cmap_defense.errors import InputValueError
from cmap_defense.threat import ThreatModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049, Algorithm 1): random search without a gradient.

    Squares of the image change, and stay changed where the margin improves. It is the search of pyautoattack's
    ``SquareAttack``, the extra ``[attacks]``. Its loss is the margin of the mean probability over ``samples``
    evaluations with independent noise (EOT), towards the targets where there are some. All images are attacked, those
    included that a random model misclassifies at first.

    The best margin is the highest of many noisy ones, with a selection effect that falls with ``samples``. Squares are
    drawn from one stream for the batch. So unlike for most attacks here, the outcome for an image depends on its batch;
    attack one image per call where that matters. Its history holds "margin", the highest averaged margin so far, at the
    start and after each change. Further arguments are those of ``Attack``.

    Args:
        queries: changes to try. Each takes ``samples`` evaluations of the model, and so does the start.
        samples: evaluations with independent noise that are averaged.
        p_init: share of the pixels in the first squares. It falls on the paper's schedule (section 3), stretched to
            ``queries``.
        confidence: the margin at which the search on an image ends, 0 for the first success as in the paper; None for
            the last query, since one success on a random model may be chance.

    Raises:
        SettingsError: a value is out of its range.
        InputValueError: the norm is l2, and the library's start does not fit on images of this size.
        MissingExtraError: pyautoattack is not installed.
    """

    queries: int = setting(1000, minimum=1)
    samples: int = setting(4, minimum=1)
    p_init: float = setting(0.8, above=0.0, maximum=1.0)
    confidence: float | None = setting(None, minimum=0.0)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        require_tiles(self.threat, clean)
        highest, history = torch.full((len(clean),), -torch.inf, device=clean.device), []

        def lacking(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            """What the search takes for the margin to overcome, positive to go on, and the loss that it lowers."""
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
        # In place of the library's, which writes into the logits, has no targets together with labels, and does not
        # know which images it gets, on which the noise depends. Its labels are positions in the batch instead.
        attack.margin_and_loss = lacking
        images = clean.float().contiguous()
        attack.init_hyperparam(images)
        _, found = attack.attack_single_run(images, torch.arange(len(clean), device=clean.device))
        return Candidates(found[:, None], {"margin": torch.stack(history)})


def require_tiles(threat: ThreatModel, images: Tensor) -> None:
    """Check that the library's start in l2, a grid of squares, fits on the images.

    Its squares have a side of a fifth of the height. It counts those that fit beginning at 0, but begins further in.

    Args:
        threat: the threat model.
        images: [B, C, H, W].

    Raises:
        InputValueError: it does not fit.
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
