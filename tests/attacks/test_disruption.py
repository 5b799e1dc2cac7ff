"""Consistency disruption: first the defence's own loop, then that with the classifier's loss; and the released bugs."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attack_toys import DOUBLE, NORMS, QUICK, SHAPE, THREATS, Linear, labelled, precise, search_seeds, wrapped
from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import ConsistencyDisruption, Goal, ThreatModel
from cmap_defense.attacks.consistency_disruption import RELEASED_BETA
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.errors import SettingsError
from toys import LinearBackbone

WHOLE = ThreatModel(eps=1.0)
"""All images are in it, so that none is projected."""
START = QUICK.iterations


def raw(attack: ConsistencyDisruption, model: PurifiedClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """The attempts [B, K, C, H, W] before they are projected."""
    oracle = Oracle(model, torch.arange(len(images)))
    return attack.run(oracle, images, Goal(labels)).images


@pytest.mark.parametrize("options", [{}, {"max_parallel": 1}, {"max_parallel": 3}])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_first_steps_are_the_purification_itself(options: dict[str, Any], released: bool, schedule: str):
    """With beta = 0 all of them are; a generator that is linear gives the latents back."""
    images, labels = labelled(2)
    backbone = LinearBackbone(SHAPE)
    settings = CMAPSettings(n_latents=3, iterations=6, learning_rate=0.05, schedule=schedule)
    model = wrapped(backbone=backbone, settings=settings, **options)
    attack = ConsistencyDisruption(WHOLE, steps=8, seed=2, released=released)
    result = attack(model, images, labels)
    longer = settings if schedule == "cosine" else settings.replace(iterations=8)
    purified = model.variant(settings=longer).purify(images, seeds=search_seeds(range(2), 2, 1))
    assert purified.history is not None
    common = 6 if schedule == "cosine" else 7  # that with another rate ends there
    found, expected = result.history["objective"][:common], purified.history.total[:common]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(result.history["cross_entropy"][:6], torch.zeros(6, 2))
    assert (result.history["cross_entropy"][6:] > 0).all()
    assert result.queries == 1 + 3 + 1
    if schedule == "cosine":  # the rate goes up again after the purification
        return
    blind = dataclasses.replace(attack, beta=0.0)(model, images, labels)
    torch.testing.assert_close(blind.candidates, purified.images, rtol=0, atol=1e-5)
    latents = (2 * blind.candidates - 1 - backbone.offset) / backbone.slope
    torch.testing.assert_close(latents, purified.latents, rtol=0, atol=1e-4)
    if not released:  # its gain from two steps may be none
        assert (result.candidates - purified.images).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 7, 8])
@pytest.mark.parametrize("released", [False, True])
def test_no_more_steps_than_the_purification_are_refused(steps: int, released: bool):
    """They would disrupt nothing."""
    classifier = Linear()
    model = wrapped(classifier=classifier, settings=QUICK.replace(iterations=8))
    with pytest.raises(SettingsError, match=rf"more than the 8 iterations of the .*, but is {steps}\."):
        ConsistencyDisruption(WHOLE, steps=steps, released=released)(model, *labelled())
    assert not classifier.calls
    assert ConsistencyDisruption(WHOLE).passes_per_image(model) == 2 * 1001
    longer = model.variant(settings=QUICK.replace(iterations=300))
    assert ConsistencyDisruption(WHOLE).passes_per_image(longer) == 2 * 1501
    assert ConsistencyDisruption(WHOLE, steps=9, released=released)(model, *labelled()).queries == 1 + 2 + 1


def test_early_stops_are_left_out_of_the_search():
    images, labels = labelled(2)
    settings = QUICK.replace(iterations=8)
    model = wrapped(settings=settings.replace(stop_decrease=0.9, stop_window=1))
    stopped = model.purify(images, seeds=search_seeds(range(2), 2, 1)).iterations
    assert stopped is not None
    assert (stopped < 8).all()
    attack = ConsistencyDisruption(WHOLE, steps=10, seed=2)
    result, whole = (attack(one, images, labels) for one in (model, wrapped(settings=settings)))
    assert torch.equal(result.history["objective"], whole.history["objective"])
    assert torch.equal(result.candidates, whole.candidates)


def plain(attack: ConsistencyDisruption, model: Any, images: Tensor, goal: Goal, beta: float) -> tuple[Tensor, Tensor]:
    """Algorithm 2 written out: the generated images after all steps, and the cross-entropy [., B] of later steps."""
    settings, count, eps = model.settings, model.settings.n_latents, attack.threat.eps
    latents = model.initial_latents(images, seeds=search_seeds(range(len(images)), attack.seed, 1)).requires_grad_()
    optimiser = torch.optim.Adam([latents], lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
    x, entropies = images[:, None], []

    def moved(generated: Tensor) -> Tensor:
        delta = generated - x
        if attack.threat.norm == "linf":
            return x + torch.minimum(torch.maximum(delta, torch.tensor(-eps)), torch.tensor(eps))
        length = delta.square().sum(dim=(2, 3, 4), keepdim=True).sqrt()
        return x + delta / length * (eps if attack.released else length.clamp_max(eps))

    for step in range(attack.steps):
        loss = count * model.objective(latents, images).total.sum()
        if step >= settings.iterations:
            generated = model.generate(latents)
            if attack.released:
                logits = model.classifier(moved(generated).flatten(0, 1)).unflatten(0, generated.shape[:2])
                powers = logits.permute(1, 0, 2).exp()  # [K, B, classes]
                chances = powers / powers.sum(dim=1, keepdim=True)  # each class sums to 1 over the images
                again = chances - chances.exp().sum(dim=2, keepdim=True).log()
                entropy = -again[:, torch.arange(len(images)), goal.labels].T
                loss = loss - beta * entropy.sum()
            else:
                legal = moved(generated).clamp(0, 1).detach()
                logits = model.classifier((legal + generated - generated.detach()).flatten(0, 1))
                own, sign = (goal.labels, 1) if goal.targets is None else (goal.targets, -1)
                entropy = sign * F.cross_entropy(logits, own.repeat_interleave(count), reduction="none").view(-1, count)
                delta = (generated - x).flatten(2)
                far = (delta.abs() - eps).clamp_min(0).sum(dim=2)
                if attack.threat.norm == "l2":
                    far = (delta.norm(dim=2) - eps).clamp_min(0) * delta.shape[2] ** 0.5
                loss = loss - beta * entropy.sum() + beta * attack.penalty * far.sum()
            entropies.append(entropy.detach().mean(dim=1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    generated = model.generate(latents.detach()).detach()
    return (moved(generated) if attack.released else generated), torch.stack(entropies)


@NORMS
@pytest.mark.parametrize("beta", [None, 100.0])
@pytest.mark.parametrize("kind", ["ours", "targeted", "released"])
def test_against_a_plain_loop(norm: str, beta: float | None, kind: str):
    images, labels = labelled(3, dtype=DOUBLE)
    targets, threat = (labels + 1) % 4 if kind == "targeted" else None, THREATS[norm]
    options: Any = {"released": kind == "released", "penalty": 0.7, "seed": 2}
    attack = ConsistencyDisruption(threat, steps=START + 5, beta=beta, **options)
    result = attack(precise(), images, labels, targets=targets)
    weight = RELEASED_BETA[norm] if beta is None else beta
    generated, entropies = plain(attack, precise(), images, Goal(labels, targets), weight)
    expected = torch.stack([threat.project(part, images) for part in generated.unbind(dim=1)], dim=1)
    torch.testing.assert_close(result.candidates, expected, rtol=0, atol=1e-6)
    found = result.history["cross_entropy"][START:].double()
    torch.testing.assert_close(found, entropies, rtol=1e-5, atol=1e-5)
    other = dataclasses.replace(attack, beta=0.0)(precise(), images, labels, targets=targets)
    assert (other.candidates - result.candidates).abs().max() > 1e-3


@NORMS
def test_the_cross_entropy_rises_for_each_of_the_latents(norm: str):
    model = wrapped(settings=QUICK.replace(n_latents=3))
    result = ConsistencyDisruption(THREATS[norm], steps=START + 25)(model, *labelled(4))
    entropy = result.history["cross_entropy"]
    assert (entropy[:START] == 0).all()
    assert (entropy[-1] > 2 * entropy[START]).all()
    assert entropy[-1].mean() > entropy[START].mean() + 2
    assert result.any_candidate_success.all()
    assert result.candidates.shape == (4, 3, *SHAPE)
    assert ((result.candidates[:, 0] - result.candidates[:, 1]).abs().flatten(1).amax(dim=1) > 1e-3).all()


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


@NORMS
def test_released_images_leave_the_ball_and_the_cube_during_the_search_and_never_in_the_result(norm: str):
    """In l2 they are moved to exactly eps, even from inside."""
    images, labels = labelled(3, dtype=DOUBLE)
    images, threat = images.round(), ThreatModel(norm=norm, eps=0.4 if norm == "linf" else 12.0)
    attack = ConsistencyDisruption(threat, steps=5, released=True)
    attempts = raw(attack, precise(), images, labels)
    if norm == "l2":
        assert (attempts.amax() > 1) | (attempts.amin() < 0)
        lengths = [
            (raw(one, precise(), images, labels) - images[:, None]).flatten(2).norm(dim=2)
            for one in (attack, dataclasses.replace(attack, released=False))
        ]
        torch.testing.assert_close(lengths[0], torch.full((3, 2), 12.0, dtype=DOUBLE))
        assert (lengths[1] - 12.0).abs().min() > 1e-3
    result = attack(precise(), images, labels)
    assert result.candidates.amin() >= 0
    assert result.candidates.amax() <= 1
    assert (result.distance <= threat.eps * (1 + 1e-9)).all()
