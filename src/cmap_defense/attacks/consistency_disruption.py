"""The adaptive attack of the CMAP paper: the latent loop with the classifier's loss in its objective."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import CrossEntropy, Goal
from cmap_defense.attacks.latents import Searched, excess, project_all
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cmap.objective import objective_terms
from cmap_defense.common.settings import setting
from cmap_defense.errors import SettingsError

RELEASED_BETA = {"linf": 2e6, "l2": 1e9}
"""Beta of the released CIFAR-10 scripts, for L plus the mean cross-entropy over the K latents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyDisruption(Attack):
    """Consistency disruption (Algorithm 2 and eq. 15 of arXiv 2412.08394).

    The first N steps are the purification of the clean image, all N of them: early stops of the settings
    (``stop_decrease``, ``stop_agreement``) are left out of the search, for Adam goes on from step N. Then the K latents
    go on with the objective

        L - beta (1/K) sum_k CE(C(P(G(u_k))), y) + beta penalty (1/K) sum_k excess(G(u_k), x),

    where P is the projection onto the threat model, with the identity as its gradient, and excess the distance outside
    the ball, which replaces the gradient that a clamp loses. Each of the K images is an attempt. The paper's
    criterion, any of the K, is ``any_candidate_success``. The model must be a purified classifier.

    Its history (Fig. 4 and 5) holds "cross_entropy", the mean over the latents, 0 during the purification;
    "objective", L of eq. 9; "right", the share of the K projected images that are classified correctly; "latent_mean"
    and "latent_std", over all elements of an image's latents. Further arguments are those of
    ``Attack``.

    Args:
        steps: number of steps, more than the N of the purification, which are the first of them; None for the paper's
            1000, or 5 N where that is more.
        beta: weight of the cross-entropy; None for the released 2e6 (linf) or 1e9 (l2). The paper tries several and
            reports the worst (Tab. X).
        penalty: weight of the excess, relative to the cross-entropy.
        released: search as the released code does, for comparison with it alone. Its bugs are a softmax over the batch
            before the cross-entropy, so that the batch size matters (5 and 10 there), clamps without a gradient, no
            clamp to [0, 1] during the search, l2 images moved to exactly eps, and no penalty. The bugs of its
            evaluation, a vote on the K images together and the better or worse of two votes, are not reproduced.

    Raises:
        SettingsError: a value is out of its range, or the model is something else.
    """

    needs_latents: ClassVar[bool] = True

    steps: int | None = setting(None, minimum=1)
    beta: float | None = setting(None, minimum=0.0)
    penalty: float = setting(0.03, minimum=0.0)
    released: bool = setting(False)

    def passes_per_image(self, model: PurifiedClassifier) -> int:
        return self.restarts * model.purifier.n_latents * (self._steps(model) + 1)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        wrapper = oracle.wrapper(self)
        if self.released and goal.targets is not None:
            raise SettingsError("ConsistencyDisruption(released=True) takes no targets: the released loss has none.")
        settings, count, steps = wrapper.settings, wrapper.settings.n_latents, self._steps(wrapper)
        if steps <= settings.iterations:
            raise SettingsError(
                f"ConsistencyDisruption.steps must be more than the {settings.iterations} iterations of the "
                f"purification, which are part of them, but is {self.steps}."
            )
        oracle.wrapper(self, clean)  # checks the number of classes
        oracle.next_noise()
        begin = wrapper.initial_latents(clean, seeds=oracle.starting_noise())
        searched = Searched(wrapper, begin, wrapper.latent_class_labels(clean), clean)
        small = wrapper.preprocessing.resized(clean, wrapper.image_shape[1:]).to(begin.dtype)
        beta = RELEASED_BETA[self.threat.norm] if self.beta is None else self.beta
        names = ("cross_entropy", "objective", "right", "latent_mean", "latent_std")
        history = {name: torch.zeros((steps, len(clean)), device=clean.device) for name in names}

        def note(name: str, step: int, rows: slice, values: Tensor) -> None:
            history[name][step, rows] = values.detach().to(clean.device, torch.float32)

        def loss(latents: Tensor, rows: slice, step: int) -> Tensor:
            generated = searched.generate(latents, rows, None)
            value = objective_terms(latents, 2 * generated - 1, small[rows], settings).total
            note("objective", step, rows, value)
            note("latent_mean", step, rows, latents.flatten(1).mean(dim=1))
            note("latent_std", step, rows, latents.flatten(1).std(dim=1))
            images, own = wrapper.preprocessing.resized(generated.flatten(0, 1), clean.shape[2:]), clean[rows]
            images = images.unflatten(0, latents.shape[:2])
            if step < settings.iterations:
                with torch.no_grad():
                    note("right", step, rows, _right(self._projected_logits(searched, images, own), goal.rows(rows)))
                return count * value
            logits = self._projected_logits(searched, images, own)
            note("right", step, rows, _right(logits, goal.rows(rows)))
            gain = self._gain(logits, goal.rows(rows))
            note("cross_entropy", step, rows, gain.mean(dim=1))
            disrupted = count * value - beta * gain.sum(dim=1)
            if self.released:
                return disrupted
            return disrupted + beta * self.penalty * excess(self.threat, images, own).sum(dim=1)

        def rate(step: int) -> float:
            return settings.rate_at(step) if step < settings.iterations else settings.learning_rate

        adam = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
        latents = searched.descend(loss, steps, whole=self.released, rate=rate, **adam)
        with torch.no_grad():
            images = torch.cat([searched.generate(latents[rows], rows, clean) for rows in searched.parts()])
        if self.released:
            images = _released_projection(self.threat.norm, self.threat.eps, images, clean)
        return Candidates(images, history)

    def _steps(self, model: PurifiedClassifier) -> int:
        return max(1000, 5 * model.settings.iterations) if self.steps is None else self.steps

    def _projected_logits(self, searched: Searched, images: Tensor, clean: Tensor) -> Tensor:
        """The classifier's logits [b, K, classes] for the projected images."""
        if self.released:
            projected = _released_projection(self.threat.norm, self.threat.eps, images, clean)
            return searched.wrapper.undefended(projected.flatten(0, 1), check=False).unflatten(0, images.shape[:2])
        projected = images + (project_all(self.threat, images, clean) - images).detach()
        return searched.classify(projected).unflatten(0, images.shape[:2])

    def _gain(self, logits: Tensor, goal: Goal) -> Tensor:
        """The cross-entropy [b, K] to raise: of the true class, or minus that of the target."""
        if self.released:
            over_batch = logits.transpose(0, 1).softmax(dim=1)  # [K, B, classes], normalised over the images
            classes = goal.labels.expand(over_batch.shape[:2])
            return F.cross_entropy(over_batch.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes).T
        count = logits.shape[1]
        return CrossEntropy()(logits.flatten(0, 1)[None], goal.repeated(count)).unflatten(0, (-1, count))


def _right(logits: Tensor, goal: Goal) -> Tensor:
    """The share [b] of K images with logits [b, K, classes] that are classified correctly."""
    return (logits.argmax(dim=2) == goal.labels[:, None]).float().mean(dim=1)


def _released_projection(norm: str, eps: float, images: Tensor, clean: Tensor) -> Tensor:
    """The authors' projection of [b, K, C, H, W] around [b, C, H, W]: not to [0, 1], and in l2 to exactly eps."""
    delta = images - clean[:, None]
    if norm == "linf":
        return clean[:, None] + delta.clamp(-eps, eps)
    length = delta.flatten(2).norm(dim=2).clamp_min(torch.finfo(delta.dtype).tiny)
    return clean[:, None] + delta * (eps / length)[:, :, None, None, None]
