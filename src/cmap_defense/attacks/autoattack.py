"""AutoAttack, by the authors' library, repeated where its successes are by chance."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks.base import Candidates, GradientAttack
from cmap_defense.attacks.goal import Goal
from cmap_defense.attacks.libraries import NORMS, LibraryModel, pyautoattack, require_tiles, undisturbed
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.common.rng import generator_for
from cmap_defense.common.settings import setting
from cmap_defense.errors import SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoAttack(GradientAttack):
    """AutoAttack (Croce and Hein 2020, arXiv 2003.01690, section 5; "rand" with EOT on two losses of APGD).

    It is ``AutoAttack`` of pyautoattack, the extra ``[attacks]``, run in rounds. The library believes one prediction
    per image. An image that a random model misclassifies by chance counts as broken, is returned unperturbed and is
    never attacked; before APGD a second prediction is believed in the same way. Here APGD attacks all images. After
    each round the returned images are re-evaluated, and those that were claimed broken but are classified correctly go
    into the next round. The attempt is the image of the round with the most successes, the latest on ties.

    The library draws noise from one stream and drops images that it is done with. So unlike for most attacks here, the
    outcome for an image depends on its batch unless ``batch_size=1``. For a random or optimising defence its robust
    accuracy is an upper bound, often a loose one, since it does not attack the latents.

    There are no targets. The library's checks of the model go to the logger "auto-attack", which is silent where
    nothing handles it. Its history holds after each round "claimed", 1 where the library says that the image is broken,
    and "held", the share of re-evaluations of that image that succeed. Images outside a round keep their numbers.
    Further arguments are those of ``Attack``.

    Args:
        version: "rand" for random models; "standard" or "plus" for deterministic ones. On a random model the latter
            run, but each of their steps believes a single prediction.
        eot: evaluations per gradient of APGD; None for the version's, 20 in "rand" and 1 otherwise. Targeted APGD and
            FAB take 1, as in the library.
        steps: of APGD and FAB; None for the version's 100.
        queries: of Square; None for the version's 5000.
        gradient: the gradient mode of a purified classifier during the search; None for its own.
        rounds: runs of the library, at most; 1 for the library's own result.
        confirmations: re-evaluations that must all succeed before a claim is believed.
        batch_size: images that the library gets at once; None for all. With known noise it is always 1, since the
            library drops images, and the rest of a batch would have other noise.

    Raises:
        SettingsError: a value is out of its range, there are targets, or the model has fewer than 3 classes ("rand") or
            4 (the others).
        InputValueError: "standard" or "plus" in l2, with images of a size on which Square cannot start.
        MissingExtraError: pyautoattack is not installed.
    """

    version: str = setting("rand", choices=("rand", "standard", "plus"))
    eot: int | None = setting(None, minimum=1)
    steps: int | None = setting(None, minimum=1)
    queries: int | None = setting(None, minimum=1)
    rounds: int = setting(3, minimum=1)
    confirmations: int = setting(3, minimum=1)
    batch_size: int | None = setting(None, minimum=1)

    def check_installed(self) -> None:
        pyautoattack()

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
        """Rounds of the library: the first on all images, the others on those for which its claim did not hold."""
        best, most = clean.clone(), torch.full((len(clean),), -1.0, device=clean.device)
        claimed, held = torch.zeros_like(most), torch.zeros_like(most)
        rows: list[tuple[Tensor, Tensor]] = []
        left = torch.arange(len(clean), device=clean.device)
        for _ in range(self.rounds):
            if len(left):
                part, own = oracle.rows(left), goal.rows(left)
                found, broken = self._library(part, clean[left], own)
                with torch.no_grad():
                    predictions = torch.stack([part(found).argmax(dim=1) for _ in range(self.confirmations)])
                share = own.reached(predictions).float().mean(dim=0)
                better = left[share >= most[left]]
                best[better], most[better] = found[share >= most[left]], share[share >= most[left]]
                claimed[left], held[left] = broken.to(claimed), share
                left = left[broken & (share < 1)]
            rows.append((claimed.clone(), held.clone()))
        first, second = zip(*rows, strict=True)
        return Candidates(best[:, None], {"claimed": torch.stack(first), "held": torch.stack(second)})

    def _library(self, oracle: Oracle, clean: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        """One run: images [b, C, H, W], and whether the library claims that they are broken, [b]."""
        model = LibraryModel(oracle, clean, classes=3 if self.version == "rand" else 4)
        images = clean.float().contiguous()
        with undisturbed(), torch.no_grad():
            targets = min(9, model(images).shape[1] - 1)
            attack = pyautoattack().AutoAttack(
                model,
                norm=NORMS[self.threat.norm],
                eps=self.threat.eps,
                seed=generator_for(oracle.count, *oracle.draws.tolist()).initial_seed(),
                version=self.version,
                device=images.device,
            )
            tried = images.clone()
            self._set(attack, targets, images, tried)
            found, predictions = attack.run_standard_evaluation(images, goal.labels, batch_size=len(images))
        broken = predictions != goal.labels
        return torch.where(broken[:, None, None, None], found, tried).to(clean), broken

    def _set(self, attack: Any, targets: int, images: Tensor, tried: Tensor) -> None:
        """Set our settings in place of the version's; ``tried`` gets the image that APGD ends with for each image."""
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
    """The library's ``APGDAttack.perturb`` without its first prediction, by which it skips images.

    Where it found no misclassified image, that of the highest loss goes into ``tried``, at the position that the image
    has in the batch ``whole``.
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
