"""The adaptive attack of the CMAP paper: the latent loop itself, turned against the classifier."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from cmap_defense.attacks.base import Attack, Candidates
from cmap_defense.attacks.goal import CrossEntropy, Goal
from cmap_defense.attacks.latents import Searched, descend, excess, project_all
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.cmap.objective import objective_terms
from cmap_defense.errors import SettingsError
from cmap_defense.settings import require_flag, require_integer, require_number

__all__ = ["ConsistencyDisruption"]

RELEASED_BETA = {"linf": 2e6, "l2": 1e9}
"""Of the CIFAR-10 scripts, on the scale of L with the mean cross-entropy over the K latents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyDisruption(Attack):
    """Algorithm 2 of arXiv 2412.08394 (eq. 15): the purification's own objective, less beta times the cross-entropy.

    The first N steps are the purification of the clean image; then the K latents go on with

        L - beta (1/K) sum_k CE(C(P(G(u_k))), y) + beta penalty (1/K) sum_k excess(G(u_k), x),

    with P the projection onto the threat model, passed through unchanged on the way back, and excess the distance
    outside it, which takes over what the gradient of a clamp loses. Each of the K images is an attempt of its own: the
    paper's criterion, any of the K, is ``any_candidate_success``.

    Args:
        steps: in all; the first N are the purification's, so there must be more than that.
        beta: None for the released 2e6 (linf) or 1e9 (l2). The paper tries several and reports the worst (Tab. X).
        penalty: on the excess, relative to the cross-entropy.
        released: the released code's search, bugs included, for comparison with it and for nothing else: a softmax
            over the batch before the cross-entropy (so the batch size matters: 5 and 10 there), clamps that kill the
            gradient, no clamp to [0, 1] on the way, l2 images moved to exactly eps, no penalty. The bugs of its
            judgement (the K images voted on together, the better or worse of two votes) are not reproduced.

    Other arguments: :class:`~cmap_defense.attacks.base.Attack`. The model must be a purified classifier.

    history (Fig. 4 and 5): "cross_entropy", mean over the latents; 0 during the purification. "objective": L (9).
    "right": the share of the K images, as they are shown to the classifier, that are taken for their true class.
    "latent_mean", "latent_std": over all elements of an image's latents.

    Raises:
        SettingsError: a value is out of its range, or the model is something else.
    """

    steps: int = 1000
    beta: float | None = None
    penalty: float = 0.03
    released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("ConsistencyDisruption", "steps", self.steps, minimum=1)
        if self.beta is not None:
            require_number("ConsistencyDisruption", "beta", self.beta, minimum=0.0)
        require_number("ConsistencyDisruption", "penalty", self.penalty, minimum=0.0)
        require_flag("ConsistencyDisruption", "released", self.released)

    def at_iterations(self, iterations: int) -> ConsistencyDisruption:
        return self if self.steps > iterations else dataclasses.replace(self, steps=iterations + 1)

    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        wrapper = oracle.wrapper(self)
        if self.released and goal.targets is not None:
            raise SettingsError("ConsistencyDisruption(released=True) takes no targets: the released loss has none.")
        settings, count = wrapper.settings, wrapper.settings.n_latents
        if self.steps <= settings.iterations:
            raise SettingsError(
                f"ConsistencyDisruption.steps must be more than the {settings.iterations} iterations of the "
                f"purification, which are part of them, but is {self.steps}."
            )
        oracle.check_classes(wrapper, clean)
        begin = wrapper.initial_latents(clean, seeds=oracle.next_noise())
        searched = Searched(wrapper, begin, wrapper.latent_class_labels(clean), clean)
        small = wrapper.preprocessing.resized(clean, wrapper.image_shape[1:]).to(begin.dtype)
        beta = RELEASED_BETA[self.threat.norm] if self.beta is None else self.beta
        names = ("cross_entropy", "objective", "right", "latent_mean", "latent_std")
        history = {name: torch.zeros((self.steps, len(clean)), device=clean.device) for name in names}

        def note(name: str, step: int, rows: slice, values: Tensor) -> None:
            history[name][step, rows] = values.detach().to(clean.device, torch.float32)

        def loss(latents: Tensor, rows: slice, step: int) -> Tensor:
            generated = searched.generate(latents, rows, None)
            value = objective_terms(latents, 2 * generated - 1, small[rows], settings).total
            note("objective", step, rows, value)
            note("latent_mean", step, rows, latents.flatten(1).mean(dim=1))
            note("latent_std", step, rows, latents.flatten(1).std(dim=1))
            shown, own = wrapper.preprocessing.resized(generated.flatten(0, 1), clean.shape[2:]), clean[rows]
            shown = shown.unflatten(0, latents.shape[:2])
            if step < settings.iterations:
                with torch.no_grad():
                    note("right", step, rows, _right(self._shown_logits(searched, shown, own), goal.rows(rows)))
                return count * value
            logits = self._shown_logits(searched, shown, own)
            note("right", step, rows, _right(logits, goal.rows(rows)))
            gain = self._gain(logits, goal.rows(rows))
            note("cross_entropy", step, rows, gain.mean(dim=1))
            disrupted = count * value - beta * gain.sum(dim=1)
            if self.released:
                return disrupted
            return disrupted + beta * self.penalty * excess(self.threat, shown, own).sum(dim=1)

        whole = (lambda: iter([slice(0, len(clean))])) if self.released else searched.parts
        adam = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
        latents = descend(begin, whole, loss, self.steps, **adam)
        with torch.no_grad():
            images = torch.cat([searched.generate(latents[rows], rows, clean) for rows in searched.parts()])
        if self.released:
            images = _released_projection(self.threat.norm, self.threat.eps, images, clean)
        return Candidates(images, history)

    def _shown_logits(self, searched: Searched, shown: Tensor, clean: Tensor) -> Tensor:
        """[b, K, classes], the classifier on the projected images."""
        if self.released:
            projected = _released_projection(self.threat.norm, self.threat.eps, shown, clean)
            return searched.wrapper.undefended(projected.flatten(0, 1), check=False).unflatten(0, shown.shape[:2])
        projected = shown + (project_all(self.threat, shown, clean) - shown).detach()
        return searched.classify(projected).unflatten(0, shown.shape[:2])

    def _gain(self, logits: Tensor, goal: Goal) -> Tensor:
        """[b, K], the cross-entropy that is to rise; for a targeted attack less that of the target."""
        if self.released:
            over_batch = logits.transpose(0, 1).softmax(dim=1)  # [K, B, classes], normalised over the images
            classes = goal.labels.expand(over_batch.shape[:2])
            return F.cross_entropy(over_batch.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes).T
        parts = [CrossEntropy()(part[None], goal) for part in logits.unbind(dim=1)]
        return torch.stack(parts, dim=1)


def _right(logits: Tensor, goal: Goal) -> Tensor:
    """[b], the share of K images whose logits [b, K, classes] have the true class on top."""
    return (logits.argmax(dim=2) == goal.labels[:, None]).float().mean(dim=1)


def _released_projection(norm: str, eps: float, shown: Tensor, clean: Tensor) -> Tensor:
    """As the authors' release moves images [b, K, C, H, W] towards [b, C, H, W]: with the gradient of a clamp, no
    clamp to [0, 1], and in l2 to exactly eps."""
    delta = shown - clean[:, None]
    if norm == "linf":
        return clean[:, None] + delta.clamp(-eps, eps)
    length = delta.flatten(2).norm(dim=2).clamp_min(torch.finfo(delta.dtype).tiny)
    return clean[:, None] + delta * (eps / length)[:, :, None, None, None]
