"""Two attacks through the loop: a short one that carries its latents along, and one that steers to a target."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import DOUBLE, NORMS, THREATS, Linear, base_seeds, labelled, search_seeds, wrapped
from attack_toys import precise as in_double
from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import (
    CrossEntropy,
    Goal,
    LatentAttack,
    Margin,
    ShortCMAP,
    TargetSteer,
    ThreatModel,
    VoteMargin,
)
from cmap_defense.attacks.goal import margin
from cmap_defense.cmap.voting import log_mean_probability
from cmap_defense.gradients import GradientMode, Implicit, StraightThrough, Surrogate, Unrolled

SMOOTH = CMAPSettings(n_latents=2, iterations=6, learning_rate=0.05, l1_smoothing=0.05)
FIRST = LatentAttack(THREATS["l2"], steps=4, latents=2)


def precise() -> PurifiedClassifier:
    return in_double(settings=SMOOTH)


@pytest.mark.parametrize("refresh", [None, 1, 2])
@pytest.mark.parametrize(
    ("mode", "loss"),
    [(Unrolled(), Margin()), (StraightThrough(), CrossEntropy()), (Unrolled(), VoteMargin())],
    ids=repr,
)
@pytest.mark.parametrize("aimed", [False, True])
def test_against_a_plain_loop_that_carries_the_latents(refresh: int | None, mode: GradientMode, loss: Any, aimed: bool):
    images, labels = labelled(2, dtype=DOUBLE)
    targets = (labels + 1) % 4 if aimed else None
    goal, threat = Goal(labels, targets), THREATS["l2"]
    options: Any = {"gradient": mode, "refresh": refresh, "loss": loss}
    attack = ShortCMAP(threat, steps=4, iterations=2, random_start=False, seed=3, **options)
    result = attack(precise(), images, labels, targets=targets)
    model = precise()
    short = model.variant(settings=SMOOTH.replace(iterations=2), gradient=mode)
    here, latents, evaluations = images, None, 0
    for step in range(4):
        if latents is None or (refresh is not None and step % refresh == 0):
            evaluations += 1
            latents = model.purify(here, seeds=search_seeds(range(2), 3, evaluations)).latents
        evaluations += 1
        leaf = here.clone().requires_grad_()
        purified = short.purify(leaf, latents=latents)
        logits = log_mean_probability(purified.logits)
        value = loss(logits[None], goal)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(result.history["loss"][step], value.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(result.history["reached"][step], goal.reached(logits.argmax(dim=1)).float())
        latents = purified.latents.detach()
        direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        here = threat.project(here + threat.eps / 4 * direction, images)
    torch.testing.assert_close(result.candidates[:, 0], here, rtol=0, atol=1e-7)
    assert evaluations == 4 + {None: 1, 1: 4, 2: 2}[refresh]
    assert result.queries == evaluations + 1


@pytest.mark.parametrize(("refresh", "whole"), [(None, 1), (5, 1), (4, 2), (2, 3), (1, 5)])
def test_the_classifier_is_evaluated_once_per_purification(refresh: int | None, whole: int):
    """For each whole and each short one, for the re-evaluation, and for the number of classes."""
    classifier = Linear()
    attack = ShortCMAP(THREATS["linf"], steps=5, iterations=1, refresh=refresh)
    result = attack(wrapped(classifier=classifier), *labelled())
    assert classifier.calls == 1 + whole + 5 + 1
    assert result.queries == whole + 5 + 1


def target_of(model: PurifiedClassifier, images: Tensor, labels: Tensor, found: LatentAttack) -> Tensor:
    """The best of a latent attack by the undefended classifier."""
    attempts = found(model, images, labels).candidates
    leads = torch.stack([margin(model.undefended(part).detach(), Goal(labels)) for part in attempts.unbind(1)], dim=1)
    return attempts[torch.arange(len(images)), leads.argmax(dim=1)]


@NORMS
@pytest.mark.parametrize("start", ["purified", "noise"])
def test_it_starts_at_the_target(norm: str, start: str):
    images, labels = labelled(2)
    found = LatentAttack(THREATS[norm], steps=5, latents=3, start=start, seed=2)
    attack = TargetSteer(THREATS[norm], steps=1, step_size=0.0, target=found, seed=2)
    result = attack(wrapped(), images, labels)
    torch.testing.assert_close(result.images, target_of(wrapped(), images, labels, found), rtol=0, atol=1e-6)
    assert result.queries == (start == "purified") + 1 + 1


def test_without_a_target_it_is_that_of_a_latent_attack_with_its_defaults(monkeypatch: pytest.MonkeyPatch):
    used: list[LatentAttack] = []
    search = LatentAttack.search

    def short(self: LatentAttack, *arguments: Any) -> Any:
        used.append(self)
        return search(FIRST, *arguments)

    monkeypatch.setattr(LatentAttack, "search", short)
    TargetSteer(THREATS["l2"], steps=1, step_size=0.0, seed=4)(wrapped(), *labelled(2))
    assert used == [LatentAttack(THREATS["l2"])]


def test_a_target_outside_the_ball_is_brought_inside_for_the_start():
    images, labels = labelled()
    wide = LatentAttack(ThreatModel(eps=0.5), steps=5, latents=2, seed=2)
    attack = TargetSteer(THREATS["linf"], steps=1, step_size=0.0, target=wide, seed=2)
    target = target_of(wrapped(), images, labels, wide)
    expected = THREATS["linf"].project(target, images)
    assert (target - expected).abs().max() > 0.05
    torch.testing.assert_close(attack(wrapped(), images, labels).images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [None, (13, 11)])
def test_the_loss_is_the_distance_of_the_final_images(size: Any):
    images, labels = labelled(2) if size is None else labelled(2, size)
    model = wrapped(settings=SMOOTH, resize=None if size is None else "bilinear")
    attack = TargetSteer(THREATS["l2"], steps=1, step_size=0.0, target=FIRST, gradient=Unrolled())
    result = attack(model, images, labels)
    target = result.images
    purified = model.purify(target, seeds=search_seeds(range(2), 0, 2))
    distance = (purified.images - target[:, None]).square().sum(dim=(2, 3, 4)).mean(dim=1)
    torch.testing.assert_close(result.history["loss"][0], -distance, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.history["reached"][0], (purified.labels != labels).float())


def test_a_step_is_along_the_gradient_of_that_distance() -> None:
    """Against finite differences of the loss, whose noise is known."""
    images, labels = labelled(2, dtype=DOUBLE)
    options: Any = {"target": FIRST, "gradient": Unrolled(), "noise": "known"}
    wide = ThreatModel(norm="l2", eps=2.0)  # the target is well inside, so that nothing is projected
    moving, still = (TargetSteer(wide, steps=1, step_size=size, **options) for size in (1e-3, 0.0))
    begun, moved = (attack(precise(), images, labels) for attack in (still, moving))
    begin, moved = begun.images, moved.images

    def distance(where: Tensor) -> Tensor:
        with torch.no_grad():
            purified = precise().purify(where, seeds=base_seeds(range(2), 0))
        return (purified.images - begin[:, None]).square().sum(dim=(2, 3, 4)).mean(dim=1)

    direction = (moved - begin) / (moved - begin).flatten(1).norm(dim=1)[:, None, None, None]
    slope = (distance(begin + 1e-6 * direction) - distance(begin - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, -begun.history["gradient_norm"][0], rtol=1e-4, atol=1e-6)


@NORMS
def test_the_distance_falls(norm: str):
    eps = 0.1 if norm == "linf" else 1.5
    options: Any = {"step_size": eps / 12, "target": FIRST, "gradient": Unrolled()}
    attack = TargetSteer(ThreatModel(norm=norm, eps=eps), steps=10, **options)
    loss = attack(wrapped(settings=SMOOTH, seed=1), *labelled(2)).history["loss"]
    assert (loss < 0).all()
    assert (loss[1:7] > loss[:6]).all()
    assert (loss[-1] - loss[0] > 0.015 * loss[0].abs()).all()


@pytest.mark.parametrize("mode", [StraightThrough(), Surrogate(), Implicit(), Unrolled(last=1)], ids=repr)
def test_gradient_modes(mode: GradientMode):
    moved, still = (
        TargetSteer(THREATS["l2"], steps=2, target=FIRST, gradient=mode, step_size=size)(wrapped(), *labelled(2))
        for size in (None, 0.0)
    )
    assert (moved.history["gradient_norm"] > 0).all()
    assert (moved.images - still.images).abs().max() > 1e-3
