"""Two attacks through the loop: a short one that carries its latents along, and one that steers to a target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import (
    QUICK,
    SHAPE,
    THREATS,
    Denoiser,
    Linear,
    base_seeds,
    labelled,
    reevaluation_seeds,
    search_seeds,
    wrapped,
)
from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import PGD, CrossEntropy, Goal, LatentAttack, ShortCMAP, TargetSteer, ThreatModel, VoteMargin
from cmap_defense.attacks.goal import margin
from cmap_defense.cmap.optimise import LatentState
from cmap_defense.cmap.voting import log_mean_probability
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import GradientMode, Implicit, StraightThrough, Surrogate, Unrolled
from toys import LinearBackbone, noise

DOUBLE = torch.float64
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
SMOOTH = CMAPSettings(n_latents=2, iterations=6, learning_rate=0.05, l1_smoothing=0.05)
FIRST = LatentAttack(THREATS["l2"], steps=4, latents=2)


def precise(**options: Any) -> PurifiedClassifier:
    chosen = {"settings": SMOOTH} | options
    return wrapped(classifier=Linear().double(), backbone=Denoiser().double(), **chosen)


# ----------------------------------------------------------------------------------------------------------- short CMAP


@pytest.mark.parametrize("refresh", [None, 1, 2])
@pytest.mark.parametrize("mode", [Unrolled(), StraightThrough()], ids=repr)
@pytest.mark.parametrize("aimed", [False, True])
def test_against_a_plain_loop_that_carries_the_latents(refresh: int | None, mode: GradientMode, aimed: bool):
    images, labels = labelled(2, dtype=DOUBLE)
    targets = (labels + 1) % 4 if aimed else None
    goal, threat = Goal(labels, targets), THREATS["l2"]
    attack = ShortCMAP(threat, steps=4, iterations=2, gradient=mode, refresh=refresh, random_start=False, seed=3)
    result = attack(precise(), images, labels, targets=targets)
    model = precise()
    short = model.variant(settings=SMOOTH.replace(iterations=2), gradient=mode)
    here, latents, asked, losses = images, None, 0, []
    for step in range(4):
        if latents is None or (refresh is not None and step % refresh == 0):
            asked += 1
            latents = model.purify(here, seeds=search_seeds(range(2), 3, asked)).latents
        asked += 1
        leaf = here.clone().requires_grad_()
        purified = short.purify(leaf, latents=latents)
        loss = margin(log_mean_probability(purified.logits), goal)  # pyright: ignore[reportArgumentType]
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        losses.append(loss.detach())
        latents = purified.latents.detach()
        direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        here = threat.project(here + threat.eps / 4 * direction, images)
    torch.testing.assert_close(result.candidates[:, 0], here, rtol=0, atol=1e-7)
    torch.testing.assert_close(result.history["loss"], torch.stack(losses), rtol=1e-6, atol=1e-6)
    assert asked == 4 + {None: 1, 1: 4, 2: 2}[refresh]
    assert result.queries == asked + 1


@pytest.mark.parametrize(("refresh", "whole"), [(None, 1), (5, 1), (4, 2), (2, 3), (1, 5)])
def test_how_often_the_classifier_is_asked(refresh: int | None, whole: int):
    """Once for each whole purification, for each short one, for the judgement, and for the number of classes."""
    classifier = Linear()
    images, labels = labelled()
    attack = ShortCMAP(THREATS["linf"], steps=5, iterations=1, refresh=refresh)
    result = attack(wrapped(classifier=classifier), images, labels)
    assert classifier.calls == 1 + whole + 5 + 1  # first of all, how many classes it has
    assert result.queries == whole + 5 + 1


def test_carried_latents_go_on_where_the_last_step_ended():
    """On an image that does not move, four steps of two iterations come nearer than one."""
    images, labels = labelled()
    model = wrapped(settings=QUICK.replace(iterations=1, learning_rate=0.02))
    ends = []
    for steps in (1, 12):
        attack = ShortCMAP(THREATS["linf"], steps=steps, step_size=0.0, iterations=5, random_start=False)
        ends.append(attack(model, images, labels).history["loss"][-1])
    latents = model.purify(images, seeds=search_seeds(range(3), 0, 1)).latents
    short = model.variant(settings=model.settings.replace(iterations=5))
    for _ in range(12):
        purified = short.purify(images, latents=latents)
        latents = purified.latents
    told = margin(log_mean_probability(purified.logits), Goal(labels))  # pyright: ignore
    torch.testing.assert_close(ends[1], told.detach(), rtol=1e-3, atol=1e-3)
    assert (ends[0] - ends[1]).abs().min() > 1e-2


@pytest.mark.parametrize("loss", [CrossEntropy(), VoteMargin()], ids=repr)
def test_losses_of_the_short_loop(loss: Any):
    images, labels = labelled()
    model = wrapped()
    result = ShortCMAP(THREATS["linf"], steps=1, iterations=3, loss=loss, random_start=False)(model, images, labels)
    latents = model.purify(images, seeds=search_seeds(range(3), 0, 1)).latents
    logits = log_mean_probability(model.purify(images, latents=latents).logits)  # pyright: ignore
    torch.testing.assert_close(result.history["loss"][0], loss(logits[None], Goal(labels)).detach())
    reached = (logits.argmax(dim=1) != labels).float()
    assert torch.equal(result.history["reached"][0], reached)


@NORMS
def test_short_cmap_climbs_where_the_defence_was_right(norm: str):
    backbone = LinearBackbone(SHAPE)
    fitted = CMAPSettings(n_latents=2, iterations=60, learning_rate=0.1, latent_weight=0.0)
    model = wrapped(backbone=backbone, settings=fitted)
    with torch.no_grad():
        images = (backbone.generate(noise(4, *SHAPE, seed=6)) + 1) / 2
        labels = model.undefended(images).argmax(dim=1)
    threat = ThreatModel(norm=norm, eps=0.08 if norm == "linf" else 0.8)
    attack = ShortCMAP(threat, steps=12, iterations=8, random_start=False)
    result = attack(model, images, labels)
    assert (result.history["loss"][0] < 0).all()
    assert (result.history["loss"][-1] > 0.5).all()
    assert result.history["reached"][0].sum() == 0
    assert result.success.all()


def test_whole_purifications_keep_the_models_own_gradient_mode_out_of_it():
    images, labels = labelled(2)
    found = [
        ShortCMAP(THREATS["linf"], steps=2, iterations=2)(wrapped(gradient=mode), images, labels).images
        for mode in (None, Unrolled(), Implicit())
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "change",
    [{"iterations": 0}, {"refresh": 0}, {"refresh": 1.5}, {"gradient": "unrolled"}, {"gradient": None}, {"loss": 3}],
    ids=repr,
)
def test_wrong_settings_of_short_cmap_are_refused_by_name(change: dict[str, Any]):
    (name,) = change
    with pytest.raises(SettingsError, match=f"ShortCMAP.{name}"):
        ShortCMAP(ThreatModel(), **change)


# --------------------------------------------------------------------------------------------------------- target steer


def target_of(model: PurifiedClassifier, images: Tensor, labels: Tensor, found: LatentAttack) -> Tensor:
    """The best of a latent attack by the bare classifier."""
    attempts = found(model, images, labels).candidates
    leads = torch.stack([margin(model.undefended(part).detach(), Goal(labels)) for part in attempts.unbind(1)], dim=1)
    return attempts[torch.arange(len(images)), leads.argmax(dim=1)]


@NORMS
@pytest.mark.parametrize("start", ["purified", "noise"])
def test_it_starts_at_the_target(norm: str, start: str):
    images, labels = labelled()
    found = LatentAttack(THREATS[norm], steps=5, latents=3, start=start, seed=2)
    attack = TargetSteer(THREATS[norm], steps=1, step_size=0.0, target=found, seed=2)
    result = attack(wrapped(), images, labels)
    torch.testing.assert_close(result.images, target_of(wrapped(), images, labels, found), rtol=0, atol=1e-6)
    assert result.queries == (start == "purified") + 1 + 1


def test_without_a_target_it_is_that_of_a_latent_attack_with_its_defaults():
    images, labels = labelled(2)
    result = TargetSteer(THREATS["l2"], steps=1, step_size=0.0)(wrapped(), images, labels)
    expected = target_of(wrapped(), images, labels, LatentAttack(THREATS["l2"]))
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-5)


def test_a_target_outside_the_ball_is_brought_inside_for_the_start():
    images, labels = labelled()
    wide = LatentAttack(ThreatModel(eps=0.5), steps=5, latents=2, seed=2)
    attack = TargetSteer(THREATS["linf"], steps=1, step_size=0.0, target=wide, seed=2)
    target = target_of(wrapped(), images, labels, wide)
    expected = THREATS["linf"].project(target, images)
    assert (target - expected).abs().max() > 0.05
    torch.testing.assert_close(attack(wrapped(), images, labels).images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [None, (13, 11)])
@pytest.mark.parametrize("watched", [0, 1, 3])
def test_the_loss_is_the_distance_of_what_comes_out_and_of_what_is_on_the_way(
    watched: int, size: tuple[int, int] | None
):
    images, labels = labelled(2) if size is None else labelled(2, size)
    options = {} if size is None else {"resize": "bilinear"}
    model = wrapped(settings=SMOOTH, **options)
    attack = TargetSteer(THREATS["l2"], steps=1, step_size=0.0, target=FIRST, watched=watched, gradient=Unrolled())
    result = attack(model, images, labels)
    target = result.images
    seen: list[LatentState] = []
    with model.register_latent_hook(seen.append, iterations=range(6 - watched, 6)):
        purified = model.purify(target, seeds=search_seeds(range(2), 0, 2))
    distance = (purified.images - target[:, None]).square().sum(dim=(2, 3, 4)).mean(dim=1)
    small = model.preprocessing.resized(target, (8, 6))
    assert len(seen) == watched
    for state in seen:
        shown = (state.generated + 1) / 2
        distance = distance + (shown - small[:, None]).square().sum(dim=(2, 3, 4)).mean(dim=1)
    torch.testing.assert_close(result.history["loss"][0], -distance, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.history["reached"][0], (purified.labels != labels).float())


@pytest.mark.parametrize("watched", [0, 2])
def test_a_step_is_along_the_gradient_of_that_distance(watched: int):
    """Against finite differences of the loss, whose noise is known."""
    images, labels = labelled(2, dtype=DOUBLE)
    options = {"target": FIRST, "gradient": Unrolled(), "watched": watched, "noise": "known"}
    wide = ThreatModel(norm="l2", eps=2.0)  # the target is well inside, so that nothing is projected
    attack, still = (TargetSteer(wide, steps=1, step_size=size, **options) for size in (1e-3, 0.0))
    begin, moved = still(precise(), images, labels).images, attack(precise(), images, labels).images
    norms = still(precise(), images, labels).history["gradient_norm"][0]

    def distance(where: Tensor) -> Tensor:
        model, seen = precise(), []
        with model.register_latent_hook(seen.append, iterations=range(6 - watched, 6)), torch.no_grad():
            purified = model.purify(where, seeds=base_seeds(range(2), 0))
        parts = [purified.images, *((state.generated + 1) / 2 for state in seen)]
        return sum((part - begin[:, None]).square().sum(dim=(2, 3, 4)).mean(dim=1) for part in parts)  # pyright: ignore

    direction = (moved - begin) / (moved - begin).flatten(1).norm(dim=1)[:, None, None, None]
    slope = (distance(begin + 1e-6 * direction) - distance(begin - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, -norms, rtol=1e-4, atol=1e-6)


@NORMS
@pytest.mark.parametrize("watched", [0, 2])
def test_the_distance_falls(norm: str, watched: int):
    images, labels = labelled(4)
    eps = 0.1 if norm == "linf" else 1.5
    attack = TargetSteer(
        ThreatModel(norm=norm, eps=eps),
        steps=12,
        step_size=eps / 12,
        target=FIRST,
        gradient=Unrolled(),
        watched=watched,
    )
    result = attack(wrapped(settings=SMOOTH, seed=1), images, labels)
    loss = result.history["loss"]
    assert (loss < 0).all()
    assert (loss[1:7] > loss[:6]).all()
    assert (loss[-1] - loss[0] > 0.015 * loss[0].abs()).all()


@pytest.mark.parametrize("mode", [StraightThrough(), Surrogate(), Implicit(), Unrolled(last=1)], ids=repr)
def test_gradient_modes_without_anything_watched(mode: GradientMode):
    images, labels = labelled(2)
    result = TargetSteer(THREATS["l2"], steps=2, target=FIRST, gradient=mode)(wrapped(), images, labels)
    assert (result.history["gradient_norm"] > 0).all()
    still = TargetSteer(THREATS["l2"], steps=2, target=FIRST, gradient=mode, step_size=0.0)(wrapped(), images, labels)
    assert (result.images - still.images).abs().max() > 1e-3


def test_what_is_watched_must_be_in_reach_of_the_gradient():
    for mode in (StraightThrough(), Surrogate(), Implicit()):
        with pytest.raises(SettingsError, match="watched needs gradient=Unrolled"):
            TargetSteer(ThreatModel(), watched=1, gradient=mode)
    TargetSteer(ThreatModel(), watched=0, gradient=StraightThrough())
    TargetSteer(ThreatModel(), watched=3)


def test_more_watched_than_there_are_iterations_is_all_of_them():
    images, labels = labelled(2)
    found = [
        TargetSteer(THREATS["l2"], steps=2, target=FIRST, gradient=Unrolled(), watched=watched)(
            wrapped(), images, labels
        ).images
        for watched in (QUICK.iterations, 50)
    ]
    assert torch.equal(found[0], found[1])


def test_noise_of_the_search_goes_on_after_that_of_the_target(monkeypatch: pytest.MonkeyPatch):
    """The target takes the first evaluation, the steps the following ones."""
    images, labels = labelled(2)
    model, seen = wrapped(), []
    original = PurifiedClassifier._purify

    def note(self: Any, shown: Tensor, latents: Any, seeds: Any, class_labels: Any) -> Any:
        seen.append(seeds.tolist())
        return original(self, shown, latents, seeds, class_labels)

    monkeypatch.setattr(PurifiedClassifier, "_purify", note)
    TargetSteer(THREATS["l2"], steps=3, target=FIRST, seed=4)(model, images, labels)
    assert seen[:4] == [search_seeds(range(2), 4, number).tolist() for number in (1, 2, 3, 4)]
    assert seen[4:] == [reevaluation_seeds(range(2), 4, 1).tolist()]


@pytest.mark.parametrize(
    "change",
    [{"target": "latent"}, {"target": PGD(ThreatModel())}, {"gradient": None}, {"watched": -1}, {"watched": 1.0}],
    ids=repr,
)
def test_wrong_settings_of_target_steer_are_refused_by_name(change: dict[str, Any]):
    (name,) = change
    with pytest.raises(SettingsError, match=f"TargetSteer.{name}"):
        TargetSteer(ThreatModel(), **change)
