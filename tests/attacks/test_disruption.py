"""Consistency disruption: first the defence's own loop, then the same loop turned around; and the released slips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attack_toys import QUICK, SHAPE, THREATS, Denoiser, Linear, labelled, search_seeds, wrapped
from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import ConsistencyDisruption, Goal, ThreatModel
from cmap_defense.attacks.consistency_disruption import RELEASED_BETA
from cmap_defense.attacks.latents import excess
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.errors import SettingsError
from toys import LinearBackbone

DOUBLE = torch.float64
WHOLE = ThreatModel(eps=1.0)
"""Of all images: nothing is projected."""
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
START = QUICK.iterations


def precise(**options: Any) -> PurifiedClassifier:
    return wrapped(classifier=Linear().double(), backbone=Denoiser().double(), **options)


def raw(attack: ConsistencyDisruption, model: PurifiedClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """The attempts [B, K, C, H, W] before anybody projects them."""
    oracle = Oracle(model, torch.arange(len(images)))
    return attack.run(oracle, images, Goal(labels)).images


# ------------------------------------------------------------------------------------------------------- as the defence


@pytest.mark.parametrize("options", [{}, {"max_parallel": 1}, {"max_parallel": 3}])
@pytest.mark.parametrize("released", [False, True])
def test_the_first_steps_are_the_purification_itself(options: dict[str, Any], released: bool):
    images, labels = labelled()
    model = wrapped(settings=CMAPSettings(n_latents=3, iterations=12, learning_rate=0.05), **options)
    result = ConsistencyDisruption(WHOLE, steps=13, seed=2, released=released)(model, images, labels)
    longer = model.variant(settings=model.settings.replace(iterations=13))
    purified = longer.purify(images, seeds=search_seeds(range(3), 2, 1))
    assert purified.history is not None
    torch.testing.assert_close(result.history["objective"], purified.history.total, rtol=1e-5, atol=1e-4)
    assert torch.equal(result.history["cross_entropy"][:12], torch.zeros(12, 3))
    assert (result.history["cross_entropy"][12] > 0).all()
    assert result.queries == 1 + 3 + 1
    blind = ConsistencyDisruption(WHOLE, steps=13, seed=2, released=released, beta=0.0)(model, images, labels)
    torch.testing.assert_close(blind.candidates, purified.images, rtol=0, atol=1e-5)
    if not released:  # its gain from one step may be none
        assert (result.candidates - purified.images).abs().max() > 1e-3


def test_its_latents_are_the_purifications():
    """A generator that is linear gives the latents back."""
    images, labels = labelled()
    backbone = LinearBackbone(SHAPE)
    model = wrapped(backbone=backbone, settings=QUICK.replace(iterations=20))
    longer = model.variant(settings=QUICK.replace(iterations=21))
    attempts = raw(ConsistencyDisruption(WHOLE, steps=21, beta=0.0), model, images, labels)
    purified = longer.purify(images, seeds=Oracle(model, torch.arange(3)).next_noise())
    latents = (2 * attempts - 1 - backbone.offset) / backbone.slope
    torch.testing.assert_close(latents.detach(), purified.latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 8])
@pytest.mark.parametrize("released", [False, True])
def test_no_more_steps_than_the_purification_are_refused(steps: int, released: bool):
    """They would disrupt nothing."""
    classifier = Linear()
    model = wrapped(classifier=classifier, settings=QUICK.replace(iterations=8))
    images, labels = labelled()
    with pytest.raises(SettingsError, match=rf"more than the 8 iterations of the .*, but is {steps}\."):
        ConsistencyDisruption(WHOLE, steps=steps, released=released)(model, images, labels)
    assert not classifier.calls
    assert ConsistencyDisruption(WHOLE, steps=9, released=released)(model, images, labels).queries == 1 + 2 + 1


def test_the_released_loss_takes_no_targets():
    images, labels = labelled()
    with pytest.raises(SettingsError, match=r"released=True.* takes no targets"):
        ConsistencyDisruption(WHOLE, steps=9, released=True)(wrapped(), images, labels, targets=(labels + 1) % 4)


@NORMS
def test_then_the_cross_entropy_rises(norm: str):
    images, labels = labelled(4)
    result = ConsistencyDisruption(THREATS[norm], steps=START + 25)(wrapped(), images, labels)
    entropy = result.history["cross_entropy"]
    assert (entropy[:START] == 0).all()
    assert (entropy[-1] > 2 * entropy[START]).all()
    assert entropy[-1].mean() > entropy[START].mean() + 2
    assert result.any_candidate_success.all()


def test_without_a_weight_it_is_a_longer_purification():
    images, labels = labelled()
    result = ConsistencyDisruption(WHOLE, steps=START + 4, beta=0.0)(wrapped(), images, labels)
    model = wrapped(settings=QUICK.replace(iterations=START + 4))
    purified = model.purify(images, seeds=search_seeds(range(3), 0, 1))
    torch.testing.assert_close(result.candidates, purified.images, rtol=0, atol=1e-5)
    assert (result.history["cross_entropy"][START:] > 0).all()


# -------------------------------------------------------------------------------------------------------- turned around


def plain(
    model: PurifiedClassifier,
    images: Tensor,
    goal: Goal,
    threat: ThreatModel,
    *,
    seeds: Tensor,
    steps: int,
    beta: float,
    released: bool,
    penalty: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    """Algorithm 2 written out: the generated images after all steps, and the cross-entropy [B] of each later step."""
    chosen, count, eps = model.settings, model.settings.n_latents, threat.eps
    latents = model.initial_latents(images, seeds=seeds).requires_grad_()
    optimiser = torch.optim.Adam([latents], lr=chosen.learning_rate, betas=chosen.betas, eps=chosen.eps)
    x, entropies = images[:, None], []

    def moved(shown: Tensor) -> Tensor:
        delta = shown - x
        if threat.norm == "linf":
            return x + torch.minimum(torch.maximum(delta, torch.tensor(-eps)), torch.tensor(eps))
        length = delta.square().sum(dim=(2, 3, 4), keepdim=True).sqrt()
        return x + delta / length * (eps if released else length.clamp_max(eps))

    for step in range(steps):
        loss = count * model.objective(latents, images).total.sum()
        if step >= chosen.iterations:
            shown = model.generate(latents)
            if released:
                logits = model.classifier(moved(shown).flatten(0, 1)).unflatten(0, shown.shape[:2])
                powers = logits.permute(1, 0, 2).exp()  # [K, B, classes]
                chances = powers / powers.sum(dim=1, keepdim=True)  # each class sums to 1 over the images
                again = chances - chances.exp().sum(dim=2, keepdim=True).log()
                entropy = -again[:, torch.arange(len(images)), goal.labels].T
                loss = loss - beta * entropy.sum()
            else:
                legal = moved(shown).clamp(0, 1).detach()
                passed = legal + shown - shown.detach()
                logits = model.classifier(passed.flatten(0, 1))
                wanted = goal.labels if goal.targets is None else goal.targets
                sign = 1 if goal.targets is None else -1
                entropy = sign * F.cross_entropy(logits, wanted.repeat_interleave(count), reduction="none").view(
                    -1, count
                )
                delta = (shown - x).flatten(2)
                far = (delta.abs() - eps).clamp_min(0).sum(dim=2)
                if threat.norm == "l2":
                    far = (delta.norm(dim=2) - eps).clamp_min(0) * delta.shape[2] ** 0.5
                loss = loss - beta * entropy.sum() + beta * penalty * far.sum()
            entropies.append(entropy.detach().mean(dim=1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    shown = model.generate(latents.detach()).detach()
    return (moved(shown) if released else shown), entropies


@NORMS
@pytest.mark.parametrize("beta", [None, 100.0])
@pytest.mark.parametrize("kind", ["ours", "targeted", "released"])
def test_against_a_plain_loop(norm: str, beta: float | None, kind: str):
    images, labels = labelled(3, dtype=DOUBLE)
    targets, threat = (labels + 1) % 4 if kind == "targeted" else None, THREATS[norm]
    goal, released = Goal(labels, targets), kind == "released"
    attack = ConsistencyDisruption(threat, steps=START + 5, beta=beta, released=released, penalty=0.7, seed=2)
    result = attack(precise(), images, labels, targets=targets)
    shown, entropies = plain(
        precise(),
        images,
        goal,
        threat,
        seeds=search_seeds(range(3), 2, 1),
        steps=START + 5,
        beta=RELEASED_BETA[norm] if beta is None else beta,
        released=released,
        penalty=0.7,
    )
    expected = torch.stack([threat.project(part, images) for part in shown.unbind(dim=1)], dim=1)
    torch.testing.assert_close(result.candidates, expected, rtol=0, atol=1e-6)
    told = result.history["cross_entropy"][START:].double()
    torch.testing.assert_close(told, torch.stack(entropies), rtol=1e-5, atol=1e-5)
    other = attack.__class__(threat, steps=START + 5, beta=0.0, released=released, seed=2)(precise(), images, labels)
    assert (other.candidates - result.candidates).abs().max() > 1e-3


@pytest.mark.parametrize(("norm", "beta"), [("linf", 2e6), ("l2", 1e9)])
def test_the_released_weights(norm: str, beta: float):
    assert RELEASED_BETA[norm] == beta
    images, labels = labelled()
    found = [
        ConsistencyDisruption(THREATS[norm], steps=START + 3, beta=given)(wrapped(), images, labels).candidates
        for given in (None, beta, beta / 1e6)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@NORMS
def test_each_of_the_latents_is_an_attempt_that_is_judged_alone(norm: str):
    images, labels = labelled(4)
    model = wrapped(settings=QUICK.replace(n_latents=3))
    result = ConsistencyDisruption(THREATS[norm], steps=START + 4)(model, images, labels)
    assert result.candidates.shape == (4, 3, *SHAPE)
    apart = (result.candidates[:, 0] - result.candidates[:, 1]).abs().flatten(1).amax(dim=1)
    assert (apart > 1e-3).all()


# ---------------------------------------------------------------------------------------------------------- the penalty


def far_away(threat: ThreatModel, **options: Any) -> Tensor:
    """[B, K], how far outside the attempts end, on a generator that reaches everything."""
    images, labels = labelled()
    model = wrapped(backbone=LinearBackbone(SHAPE), settings=QUICK.replace(iterations=30))
    attempts = raw(ConsistencyDisruption(threat, steps=60, **options), model, images, labels)
    return excess(threat, attempts, images).detach()


@NORMS
def test_the_penalty_is_three_hundredths_where_nothing_is_said(norm: str):
    threat = ThreatModel(norm=norm, eps=0.15 if norm == "linf" else 2.0)
    told, untold, other = far_away(threat, penalty=0.03), far_away(threat), far_away(threat, penalty=0.1)
    assert torch.equal(told, untold)
    assert not torch.equal(told, other)


@NORMS
def test_the_penalty_pulls_back_what_the_cross_entropy_drives_away(norm: str):
    threat = ThreatModel(norm=norm, eps=0.15 if norm == "linf" else 2.0)
    free, held = far_away(threat, penalty=0.0), far_away(threat, penalty=20.0)
    assert (held < 0.7 * free).all()


def test_a_clamp_that_is_active_everywhere_kills_the_released_gradient_and_not_ours():
    """With a ball of no size everything generated is outside it: the released attack is the purification alone."""
    images, labels = labelled(3, dtype=DOUBLE)
    found = {}
    for released in (True, False):
        for beta in (0.0, 1e6):
            attack = ConsistencyDisruption(ThreatModel(eps=0.0), steps=START + 5, beta=beta, released=released)
            oracle = Oracle(precise(), torch.arange(3))
            found[released, beta] = attack.run(oracle, images, Goal(labels)).history["objective"]
    assert torch.equal(found[True, 0.0], found[True, 1e6])
    assert torch.equal(found[False, 0.0], found[True, 0.0])
    later = (found[False, 1e6] - found[False, 0.0]).abs()
    assert (later[: START + 1] == 0).all()
    assert (later[START + 1 :] > 1e-3).all()


# ------------------------------------------------------------------------------------------------------------ the slips


def test_released_l2_images_are_moved_to_exactly_eps_even_from_inside():
    images, labels = labelled(3, dtype=DOUBLE)
    threat = ThreatModel(norm="l2", eps=12.0)
    released = ConsistencyDisruption(threat, steps=START + 1, released=True)
    ours = ConsistencyDisruption(threat, steps=START + 1)
    lengths = [
        (raw(attack, precise(), images, labels) - images[:, None]).flatten(2).norm(dim=2) for attack in (released, ours)
    ]
    torch.testing.assert_close(lengths[0], torch.full((3, 2), 12.0, dtype=DOUBLE))
    assert (lengths[1] < 20).all()


@NORMS
def test_released_images_leave_the_cube_on_the_way_and_never_in_the_result(norm: str):
    images, labels = labelled(3, dtype=DOUBLE)
    images = images.round()
    attack = ConsistencyDisruption(ThreatModel(norm=norm, eps=0.4 if norm == "linf" else 12.0), steps=5, released=True)
    attempts = raw(attack, precise(), images, labels)
    if norm == "l2":
        assert (attempts.amax() > 1) | (attempts.amin() < 0)
    result = attack(precise(), images, labels)
    assert result.candidates.amin() >= 0
    assert result.candidates.amax() <= 1
    assert (result.distance <= attack.threat.eps * (1 + 1e-9)).all()


def test_the_released_classifier_is_shown_images_outside_the_cube():
    """And the classifier's normalisation is applied to them."""
    seen: list[Tensor] = []

    def classifier(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return images.flatten(1)[:, :4]

    images, labels = labelled()
    model = wrapped(classifier=classifier, normalize=(0.5, 0.25))
    attack = ConsistencyDisruption(ThreatModel(norm="l2", eps=12.0), steps=START + 1, released=True)
    attack.run(Oracle(model, torch.arange(3)), images, Goal(labels))
    lengths = ((seen[-1] * 0.25 + 0.5) - images.repeat_interleave(2, dim=0)).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((6,), 12.0), rtol=1e-4, atol=0)
    assert (seen[-1] * 0.25 + 0.5).amax() > 1.5


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"beta": -1.0},
        {"beta": float("inf")},
        {"beta": "2e6"},
        {"penalty": -0.1},
        {"penalty": None},
    ],
    ids=repr,
)
def test_wrong_settings_are_refused_by_name(change: dict[str, Any]):
    (name,) = change
    with pytest.raises(SettingsError, match=f"ConsistencyDisruption.{name}"):
        ConsistencyDisruption(ThreatModel(), **change)


def test_released_is_true_or_false():
    with pytest.raises(SettingsError, match="released"):
        ConsistencyDisruption(ThreatModel(), released="no")  # pyright: ignore[reportArgumentType]
