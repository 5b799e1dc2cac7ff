"""The frozen residual: what the purification did to an image is kept for some steps, and attacked as a constant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import QUICK, SHAPE, THREATS, WEIGHT, Denoiser, Linear, labelled, linear, search_seeds, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import PGD, CrossEntropy, FrozenResidual, Goal, Loss, Margin, ThreatModel, VoteMargin
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import Detached, StraightThrough
from toys import LinearBackbone, noise

DOUBLE = torch.float64
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
LOSSES = pytest.mark.parametrize("loss", [VoteMargin(), CrossEntropy(), Margin()], ids=repr)


def precise(**options: Any) -> PurifiedClassifier:
    return wrapped(classifier=Linear().double(), backbone=Denoiser().double(), **options)


def vote_margin(logits: Tensor, label: int, target: int | None) -> Tensor:
    """Of logits [R, classes]: the log of the mean probabilities, and what the wanted class leads by."""
    mean = logits.softmax(dim=1).mean(dim=0).log()
    own = label if target is None else target
    best = torch.cat([mean[:own], mean[own + 1 :]]).max()
    return best - mean[own] if target is None else mean[own] - best


@NORMS
@pytest.mark.parametrize("aimed", [False, True])
@pytest.mark.parametrize(
    ("every", "purifications", "memory", "kept"),
    [
        (2, 2, None, [2, 2, 2, 2, 2]),
        (2, 2, 3, [2, 2, 3, 3, 3]),
        (1, 1, 3, [1, 2, 3, 3, 3]),
        (2, 3, 2, [2, 2, 2, 2, 2]),
        (9, 2, None, [2, 2, 2, 2, 2]),
    ],
)
def test_against_a_plain_loop(
    norm: str, aimed: bool, every: int, purifications: int, memory: int | None, kept: list[int]
):
    """Each image alone, in the words of the docstring."""
    images, labels = labelled(2, dtype=DOUBLE)
    targets, threat = (labels + 1) % 4 if aimed else None, THREATS[norm]
    attack = FrozenResidual(
        threat, steps=5, every=every, purifications=purifications, memory=memory, random_start=False, seed=3
    )
    result = attack(precise(), images, labels, targets=targets)
    model, weight = precise(), WEIGHT.float().double()
    for image in range(2):
        clean, label = images[image], int(labels[image])
        target = None if targets is None else int(targets[image])
        here, residuals, asked = clean.clone(), [], 0
        for step in range(5):
            if step % every == 0:
                for _ in range(purifications):
                    asked += 1
                    seed = search_seeds(range(2), 3, asked)[image : image + 1]
                    found = model.purify(here[None], seeds=seed).images[0].detach()
                    residuals.append([one - here for one in found])
                residuals = residuals[-(memory or purifications) :]
            assert len(residuals) == kept[step]
            leaf = here.clone().requires_grad_()
            logits = torch.stack([((leaf + r).flatten() - 0.5) @ weight for part in residuals for r in part])
            loss = vote_margin(logits, label, target)
            (gradient,) = torch.autograd.grad(loss, leaf)
            answers = logits.argmax(dim=1).tolist()
            hits = [answer != label if target is None else answer == target for answer in answers]
            told = {name: values[step, image].item() for name, values in result.history.items()}
            assert told["loss"] == pytest.approx(loss.item(), abs=1e-6)
            assert told["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
            assert told["reached"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
            direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
            delta = here + threat.eps / 4 * direction - clean
            if norm == "linf":
                delta = delta.clamp(-threat.eps, threat.eps)
            elif delta.norm() > threat.eps:
                delta = delta * threat.eps / delta.norm()
            here = (clean + delta).clamp(0, 1)
        torch.testing.assert_close(result.candidates[image, 0], here, rtol=0, atol=1e-7)
        assert asked == math.ceil(5 / every) * purifications
        assert result.queries == asked + 1


def told(model: PurifiedClassifier, loss: Loss, count: int = 3, **options: Any) -> list[Any]:
    """What the search hears at two places, of five purifications and of ten."""
    images, labels = labelled(count, dtype=DOUBLE)
    attack = FrozenResidual(THREATS["linf"], every=1, purifications=5, memory=10, loss=loss, **options)
    feedback, start = attack.begin(Oracle(model, torch.arange(count)), images, Goal(labels))
    assert start is None
    moved = (images + 0.02 * noise(count, *SHAPE, seed=7, dtype=DOUBLE)).clamp(0, 1)
    return [feedback(images), feedback(moved)]


@LOSSES
@pytest.mark.parametrize("parallel", [1, 3, 7, 10, 12, 45])
def test_residuals_in_parts_give_the_gradient_of_all_at_once(loss: Loss, parallel: int):
    """A joint loss too, which no sum over parts is."""
    settings = QUICK.replace(n_latents=3)
    whole = told(precise(settings=settings), loss)
    for part, all_ in zip(told(precise(settings=settings, max_parallel=parallel), loss), whole, strict=True):
        torch.testing.assert_close(part.gradient, all_.gradient, rtol=0, atol=1e-6)
        torch.testing.assert_close(part.loss, all_.loss, rtol=0, atol=1e-6)
        assert torch.equal(part.reached, all_.reached)
    assert whole[0].gradient.abs().max() > 1e-3
    assert (whole[0].gradient - whole[1].gradient).abs().max() > 1e-6


class Sized(Linear):
    """Keeps the sizes of the batches it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return super().forward(images)


@pytest.mark.parametrize("parallel", [1, 2, 7, 12, 100])
def test_no_more_images_are_shown_at_once_than_the_wrapper_says(parallel: int):
    """Nor fewer: of the sixty in the end, twice."""
    classifier = Sized()
    told(wrapped(classifier=classifier.double(), backbone=Denoiser().double(), max_parallel=parallel), VoteMargin())
    assert max(classifier.sizes) <= parallel
    once = [parallel] * (60 // parallel) + ([60 % parallel] if 60 % parallel else [])
    assert classifier.sizes[-2 * len(once) :] == once + once


@LOSSES
def test_feedback_is_loss_and_gradient_of_the_residuals_written_out(loss: Loss):
    images, labels = labelled(3, dtype=DOUBLE)
    residuals = noise(7, 3, *SHAPE, seed=2, dtype=DOUBLE)
    attack, goal = FrozenResidual(ThreatModel(), loss=loss), Goal(labels)
    leaf = images.clone().requires_grad_()
    logits = torch.stack([linear(leaf + residual) for residual in residuals])
    value = loss(logits, goal)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    for parallel in (None, 1, 5):
        model = PurifiedClassifier(linear, Denoiser().double(), settings=QUICK, max_parallel=parallel)
        found = attack._feedback(model, images, residuals, goal)
        torch.testing.assert_close(found.loss, value.detach(), rtol=0, atol=1e-9)
        torch.testing.assert_close(found.gradient, gradient, rtol=0, atol=1e-9)
        share = (logits.argmax(dim=2) != labels).float().mean(dim=0)
        torch.testing.assert_close(found.reached, share)
        assert not found.loss.requires_grad
        assert not found.gradient.requires_grad


def test_one_new_purification_at_every_step_is_the_straight_through_gradient():
    """The same noise, the same constants; and the joint margin of one purification is the wrapper's soft vote's."""
    images, labels = labelled(3, dtype=DOUBLE)
    model = precise(vote="soft", gradient=StraightThrough())
    ours = FrozenResidual(THREATS["l2"], steps=4, every=1, purifications=1, seed=2)
    other = PGD(THREATS["l2"], steps=4, loss=Margin(), seed=2)
    found, expected = (attack(model, images, labels) for attack in (ours, other))
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.history["loss"], expected.history["loss"], rtol=0, atol=1e-7)
    assert found.queries == expected.queries


def test_the_gradient_mode_of_the_wrapper_does_not_matter():
    images, labels = labelled()
    found = [
        FrozenResidual(THREATS["linf"], steps=3)(wrapped(gradient=mode), images, labels).candidates
        for mode in (StraightThrough(), Detached())
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("steps", "every", "purifications", "restarts", "asked"),
    [(5, 2, 3, 1, 9), (6, 2, 3, 1, 9), (6, 10, 4, 1, 4), (3, 1, 2, 1, 6), (5, 2, 3, 2, 18)],
)
def test_queries_are_the_purifications(steps: int, every: int, purifications: int, restarts: int, asked: int):
    attack = FrozenResidual(
        ThreatModel(), steps=steps, every=every, purifications=purifications, memory=2, restarts=restarts
    )
    model, seen = wrapped(), []
    model.register_latent_hook(lambda state: seen.append(state.iteration), iterations=[0])
    result = attack(model, *labelled(), reevaluations=2)
    chosen = restarts if restarts > 1 else 0
    assert result.queries == len(seen) == asked + chosen + 2
    assert set(result.history) == {"loss", "gradient_norm", "reached"}
    for values in result.history.values():
        assert values.shape == (restarts * steps, 3)


def test_purifications_have_noise_of_their_own():
    """With a step of no size only their noise tells them apart."""
    losses = {}
    for known in ("fresh", "known"):
        attack = FrozenResidual(ThreatModel(), steps=3, every=1, purifications=1, step_size=0.0, noise=known)
        losses[known] = attack(wrapped(), *labelled()).history["loss"]
    assert torch.equal(losses["known"], losses["known"][:1].expand(3, -1))
    for first, second in ((0, 1), (1, 2)):
        assert (losses["fresh"][first] - losses["fresh"][second]).abs().min() > 1e-6


@NORMS
@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"noise": "known"}], ids=repr)
def test_the_outcome_for_an_image_is_its_own(norm: str, options: dict[str, Any]):
    images, labels = labelled(4, dtype=DOUBLE)
    attack = FrozenResidual(THREATS[norm], steps=4, every=2, purifications=2, memory=3, seed=6, **options)
    whole = attack(precise(), images, labels, indices=range(10, 14))
    for rows in ([2], [3, 1, 0, 2]):
        part = attack(precise(), images[rows], labels[rows], indices=[10 + row for row in rows])
        torch.testing.assert_close(part.candidates, whole.candidates[rows], rtol=0, atol=1e-9)
        assert torch.equal(part.predictions, whole.predictions[:, rows])
        for name, values in part.history.items():
            torch.testing.assert_close(values, whole.history[name][:, rows], rtol=1e-6, atol=1e-7)


@NORMS
@pytest.mark.parametrize("aimed", [False, True])
def test_it_succeeds_where_the_purification_hardly_moves_the_image(norm: str, aimed: bool):
    """A generator that reaches every image near the clean ones; new residuals are then like the old."""
    backbone = LinearBackbone(SHAPE)
    fitted = QUICK.replace(iterations=60, latent_weight=0.0)
    model = wrapped(backbone=backbone, settings=fitted)
    with torch.no_grad():
        images = (backbone.generate(noise(4, *SHAPE, seed=6)) + 1) / 2
        labels = model.undefended(images).argmax(dim=1)
    targets = (labels + 1) % 4 if aimed else None
    threat = ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 1.2)
    attack = FrozenResidual(threat, steps=10, every=5, purifications=2, random_start=False)
    result = attack(model, images, labels, targets=targets, reevaluations=3)
    assert (result.history["reached"][0] == 0).all()
    assert (result.history["reached"][-1] == 1).all()
    assert (result.history["loss"][-1] > result.history["loss"][0] + 5).all()
    assert (result.mean_success == 1).all()


def test_a_purified_classifier_is_needed():
    with pytest.raises(SettingsError, match=r"FrozenResidual with these settings needs .* but the model is Linear\."):
        FrozenResidual(ThreatModel())(Linear(), *labelled())


@pytest.mark.parametrize(
    "change",
    [
        {"every": 0},
        {"every": 1.5},
        {"every": None},
        {"purifications": 0},
        {"purifications": True},
        {"memory": 0},
        {"memory": 2.0},
        {"memory": "all"},
        {"loss": "vote"},
        {"loss": VoteMargin},
        {"loss": None},
        {"steps": 0},
        {"step_size": -0.1},
        {"keep": "first"},
    ],
    ids=repr,
)
def test_wrong_settings_are_refused_by_name(change: dict[str, Any]):
    (name,) = change
    with pytest.raises(SettingsError, match=f"FrozenResidual.{name}"):
        FrozenResidual(ThreatModel(), **change)
