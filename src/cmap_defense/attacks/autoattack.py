"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690), by the authors' library, with a guard against lucky answers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import Goal
from cmap_defense.attacks.libraries import (
    NORMS,
    LibraryModel,
    pyautoattack,
    require_gradient,
    seed_of,
    undisturbed,
)
from cmap_defense.attacks.oracle import Model, Oracle, differentiates_defence
from cmap_defense.attacks.square import require_tiles
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import GradientMode
from cmap_defense.settings import require_choice, require_integer

__all__ = ["AutoAttack"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """APGD on two losses with EOT ("rand"), or APGD, targeted APGD, targeted FAB and Square one after the other.

    It is ``AutoAttack`` of pyautoattack, the extra ``[attacks]``, run again where it fooled itself. The library judges
    an image by one answer of the model: one that a random model gets wrong by chance is taken for broken, handed back
    unperturbed, and never attacked; APGD asks once more, and leaves alone what is wrong then. So APGD here attacks all
    that it is given; after each round the images returned are re-evaluated, and those claimed to be
    broken to which it still answers rightly go into the next round. The image attempted is that of the round whose
    answers were wrong most often, the latest on ties.

    The library draws from one stream and drops the images that it is done with: unlike in the rest of the suite, the
    outcome for an image depends on the batch that it is in, but for ``batch_size=1``. Its figure for a random or
    optimising defence is an upper bound, and often a loose one; it knows nothing of the latents.

    Args:
        version: "rand" is for random models. "standard" and "plus" are the library's for deterministic ones: on a
            random one they run, but each of their steps believes a single answer.
        eot: evaluations per gradient of APGD; None for the version's, 20 in "rand" and 1 otherwise. Targeted APGD and
            FAB take 1, as in the library.
        steps: of APGD and FAB; None for the version's 100.
        queries: of Square; None for the version's 5000.
        gradient: the gradient mode of a purified classifier during the search; None for its own.
        rounds: of the library at most, 1 for no guard.
        confirmations: fresh answers, all of which must be wrong before a claim is believed.
        batch_size: images that the library is given at once; None for all. With known noise it is always 1, as the
            noise of an image that is left over of a batch is not its own.

    Other arguments: :class:`~cmap_defense.attacks.base.Attack`. It takes no targets. The library's own checks of the
    model go to the logger "auto-attack", which is silent where nothing handles it.

    history, after each of the rounds: "claimed", 1 where the library said that the image is broken; "held", the share
    of the fresh answers to the same image that were wrong. Images that were not in a round keep their numbers.

    Raises:
        SettingsError: a value is out of its range, there are targets, or the model has fewer than 3 classes ("rand") or
            4.
        InputValueError: l2 in "standard" or "plus", and images of a size on which Square cannot start.
        MissingExtraError: pyautoattack is not installed.
    """

    version: str = "rand"
    eot: int | None = None
    steps: int | None = None
    queries: int | None = None
    gradient: GradientMode | None = None
    rounds: int = 3
    confirmations: int = 3
    batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("AutoAttack", "version", self.version, ("rand", "standard", "plus"))
        for name in ("eot", "steps", "queries", "batch_size"):
            if getattr(self, name) is not None:
                require_integer("AutoAttack", name, getattr(self, name), minimum=1)
        require_gradient("AutoAttack", self.gradient)
        require_integer("AutoAttack", "rounds", self.rounds, minimum=1)
        require_integer("AutoAttack", "confirmations", self.confirmations, minimum=1)

    def differentiates_defence(self, model: Model) -> bool:
        return differentiates_defence(self.gradient, model)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        if goal.targets is not None:
            raise SettingsError("AutoAttack takes no targets; PGD, APGD, Square and SPSA do.")
        if self.version != "rand":
            require_tiles(self.threat, clean)
        oracle = oracle.in_mode(self.gradient, self)
        size = 1 if oracle.known else self.batch_size or len(clean)
        if size >= len(clean):
            return self._guarded(oracle, clean, goal)
        groups = torch.arange(len(clean), device=clean.device).split(size)
        parts = [oracle.rows(rows, separate_count=True) for rows in groups]
        found = [self._guarded(part, clean[rows], goal.rows(rows)) for part, rows in zip(parts, groups, strict=True)]
        oracle.counted(max(part.count for part in parts))  # per image, not of all images together
        history = {name: torch.cat([part.history[name] for part in found], dim=1) for name in found[0].history}
        return Candidates(torch.cat([part.images for part in found]), history)

    def _guarded(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        """Rounds of the library on the images of which its latest claim did not hold, at first on all."""
        best, most = clean.clone(), torch.full((len(clean),), -1.0, device=clean.device)
        claimed, held = torch.zeros_like(most), torch.zeros_like(most)
        rows: list[tuple[Tensor, Tensor]] = []
        left = torch.arange(len(clean), device=clean.device)
        for _ in range(self.rounds):
            if len(left):
                part, own = oracle.rows(left), goal.rows(left)
                found, broken = self._library(part, clean[left], own)
                with torch.no_grad():
                    answers = torch.stack([part(found).argmax(dim=1) for _ in range(self.confirmations)])
                share = own.reached(answers).float().mean(dim=0)
                better = left[share >= most[left]]
                best[better], most[better] = found[share >= most[left]], share[share >= most[left]]
                claimed[left], held[left] = broken.to(claimed), share
                left = left[broken & (share < 1)]
            rows.append((claimed.clone(), held.clone()))
        first, second = zip(*rows, strict=True)
        return Candidates(best[:, None], {"claimed": torch.stack(first), "held": torch.stack(second)})

    def _library(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        """One run: images [b, C, H, W], and whether the library takes them for broken, [b]."""
        model = LibraryModel(oracle, clean, classes=3 if self.version == "rand" else 4)
        images = clean.float().contiguous()
        with undisturbed(), torch.no_grad():
            targets = min(9, model(images).shape[1] - 1)
            attack = pyautoattack().AutoAttack(
                model,
                norm=NORMS[self.threat.norm],
                eps=self.threat.eps,
                seed=seed_of(oracle),
                version=self.version,
                device=images.device,
            )
            tried = images.clone()
            self._set(attack, targets, images, tried)
            found, answers = attack.run_standard_evaluation(images, goal.labels, batch_size=len(images))
        broken = answers != goal.labels
        return torch.where(broken[:, None, None, None], found, tried).to(clean), broken

    def _set(self, attack: Any, targets: int, images: Tensor, tried: Tensor) -> None:
        """Our settings in place of the version's. tried: gets what APGD made of each of the images in the end."""
        attack.apgd.eot_iter = attack.apgd.eot_iter if self.eot is None else self.eot
        if self.steps is not None:
            for search in (attack.apgd, attack.apgd_targeted):
                like = type(search)(None, n_iter=self.steps, eps=self.threat.eps)
                for name in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr"):
                    setattr(search, name, getattr(like, name))
        attack.apgd.perturb = functools.partial(_perturb, attack.apgd, images, tried)
        attack.fab.n_iter = attack.fab.n_iter if self.steps is None else self.steps
        attack.square.n_queries = attack.square.n_queries if self.queries is None else self.queries
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets


def _perturb(search: Any, whole: Tensor, tried: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The library's ``APGDAttack.perturb``, less its first answer, by which it leaves images alone; and what it drops,
    the image of the highest loss where no answer was wrong, is kept: the next answer may be.

    whole: the batch, of which ``images`` are some.
    """
    search.init_hyperparam(images)
    torch.manual_seed(search.seed)
    found, left = images.clone(), torch.arange(len(images), device=images.device)
    for _ in range(search.n_restarts):
        if len(left):
            best, right, _, wrong = search.attack_single_run(images[left], labels[left])
            right = right.bool()
            found[left] = torch.where(right[:, None, None, None], best, wrong)
            left = left[right]
    for image, made in zip(images, found, strict=True):
        tried[(whole == image).flatten(1).all(dim=1)] = made
    return found
