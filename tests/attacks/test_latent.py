"""Attacks on latents: the distance outside the ball, the descent, and the latent attack against plain loops."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import DOUBLE, NORMS, QUICK, SHAPE, labelled, precise, reachable, search_seeds, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import Goal, LatentAttack, ThreatModel
from cmap_defense.attacks.goal import margin
from cmap_defense.attacks.latents import Searched, excess, project_all
from cmap_defense.attacks.oracle import Oracle
from toys import noise, uniform

SEEDS = st.integers(0, 2**31)


def scene(seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Images [2, 3, C, H, W] around clean ones [2, C, H, W]."""
    clean = uniform(2, 2, 3, 4, seed=seed, dtype=DOUBLE)
    return clean[:, None] + spread * noise(2, 3, 2, 3, 4, seed=seed + 1, dtype=DOUBLE), clean


@settings(max_examples=40)
@given(
    seed=SEEDS,
    norm=st.sampled_from(["linf", "l2"]),
    spread=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    eps=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_excess_written_out_is_positive_outside_the_ball_alone(seed: int, norm: str, spread: float, eps: float):
    images, clean = scene(seed, spread)
    threat = ThreatModel(norm=norm, eps=eps)
    found = excess(threat, images, clean)
    for image, attempt in itertools.product(range(2), range(3)):
        gaps = [abs(value) for value in (images[image, attempt] - clean[image]).flatten().tolist()]
        length = sum(gap**2 for gap in gaps) ** 0.5
        expected = sum(max(gap - eps, 0) for gap in gaps) if norm == "linf" else max(length - eps, 0) * 24**0.5
        assert found[image, attempt].item() == pytest.approx(expected, abs=1e-12 if norm == "linf" else 5e-6)
    if spread and eps:
        far = torch.stack([threat.distance(part, clean) for part in images.unbind(dim=1)], dim=1)
        assert torch.equal(found > 0, far > eps)
    projected = project_all(threat, images, clean)
    for attempt in range(3):
        assert torch.equal(projected[:, attempt], threat.project(images[:, attempt], clean))


@NORMS
def test_excess_pulls_towards_the_ball_and_has_a_gradient_of_zero_in_its_middle(norm: str):
    images, clean = scene(1, 1.0)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(excess(ThreatModel(norm=norm, eps=0.1), leaf, clean).sum(), leaf)
    delta = images - clean[:, None]
    if norm == "linf":
        assert torch.equal(gradient, torch.where(delta.abs() > 0.1, delta.sign(), 0.0))
    else:
        direction = delta / delta.flatten(2).norm(dim=2)[:, :, None, None, None]
        torch.testing.assert_close(gradient, direction * 24**0.5)
    middle = clean[:, None].repeat(1, 3, 1, 1, 1).requires_grad_()
    (still,) = torch.autograd.grad(excess(ThreatModel(norm=norm, eps=0.0), middle, clean).sum(), middle)
    assert torch.equal(still, torch.zeros_like(still))


@pytest.mark.parametrize("cuts", [[4], [1, 1, 2], [3, 1]])
def test_descent_in_parts_is_adam_on_each_image(cuts: list[int]):
    begin = noise(4, 2, *SHAPE, seed=1, dtype=DOUBLE)
    target = noise(4, 1, *SHAPE, seed=2, dtype=DOUBLE)
    steps_seen: list[int] = []

    class Cut(Searched):
        def parts(self) -> Any:
            edges = [sum(cuts[:n]) for n in range(len(cuts) + 1)]
            return (slice(first, last) for first, last in itertools.pairwise(edges))

    def loss(latents: Tensor, rows: slice, step: int) -> Tensor:
        steps_seen.append(step)
        return (1 + step) * (latents - target[rows]).pow(4).flatten(1).sum(dim=1)

    kept = begin.clone()
    nothing: Any = None
    found = Cut(nothing, begin, None, nothing).descend(loss, 5, lr=0.1, betas=(0.8, 0.95))
    assert steps_seen == [step for step in range(5) for _ in cuts]
    assert torch.equal(begin, kept)
    assert not found.requires_grad
    for image in range(4):
        own = begin[image].clone().requires_grad_()
        optimiser = torch.optim.Adam([own], lr=0.1, betas=(0.8, 0.95))
        for step in range(5):
            optimiser.zero_grad()
            ((1 + step) * (own - target[image]).pow(4).sum()).backward()
            optimiser.step()
        torch.testing.assert_close(found[image], own.detach())


@NORMS
def test_in_a_ball_of_no_size_the_clean_images_come_back(norm: str):
    images, labels = labelled()
    result = LatentAttack(ThreatModel(norm=norm, eps=0.0), steps=3, latents=2)(wrapped(), images, labels)
    assert torch.equal(result.images, images)
    assert torch.equal(result.candidates, images[:, None].expand(-1, 2, -1, -1, -1))
    clean = margin(wrapped().undefended(images).detach(), Goal(labels))
    torch.testing.assert_close(result.history["margin"], clean.expand(3, -1))
    assert (result.history["excess"] > 0).all()


def plain_latent_attack(
    attack: LatentAttack, model: PurifiedClassifier, clean: Tensor, goal: Goal, begin: Tensor
) -> Any:
    """One latent of one image, in the words of the docstring: the best legal image, and margin and excess by step."""
    latent = begin.clone().requires_grad_()
    optimiser = torch.optim.Adam([latent], lr=attack.learning_rate)
    best, highest, margins, outside = clean, -float("inf"), [], []
    for step in range(attack.steps):
        generated = (model.backbone.generate(latent).clamp(-1, 1) + 1) / 2
        legal = attack.threat.project(generated.detach(), clean)
        now = margin(model.classifier(legal).detach(), goal).item()
        if now > highest:
            best, highest = legal, now
        delta = (generated - clean).flatten()
        if attack.threat.norm == "linf":
            far = (delta.abs() - attack.threat.eps).clamp_min(0).sum()
        else:
            far = (delta.norm() - attack.threat.eps).clamp_min(0) * delta.numel() ** 0.5
        margins.append(now)
        outside.append(far.item())
        weight = attack.penalty * attack.growth ** (step / max(1, attack.steps - 1))
        loss = weight * far + (attack.confidence - margin(model.classifier(generated), goal)[0]).clamp_min(0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return best[0], margins, outside


@NORMS
@pytest.mark.parametrize("aimed", [False, True])
@pytest.mark.parametrize("start", ["purified", "noise"])
def test_against_a_plain_loop(norm: str, aimed: bool, start: str):
    images, labels = labelled(2, dtype=DOUBLE)
    targets = (labels + 1) % 4 if aimed else None
    threat = ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 0.8)
    attack = LatentAttack(threat, steps=6, latents=3, start=start, penalty=0.5, growth=4.0, seed=3)
    model = precise()
    many = model.variant(settings=QUICK.replace(n_latents=3))
    begin = many.initial_latents(images, seeds=search_seeds(range(2), 3, 0))
    if start == "purified":
        begin = many.purify(images, seeds=search_seeds(range(2), 3, 1)).latents
    result = attack(model, images, labels, targets=targets)
    assert result.queries == (1 if start == "purified" else 0) + 3 + 1
    for image in range(2):
        one = slice(image, image + 1)
        goal, histories = Goal(labels, targets).rows(one), []
        for place in range(3):
            best, *history = plain_latent_attack(attack, model, images[one], goal, begin[image, place : place + 1])
            torch.testing.assert_close(result.candidates[image, place], best, rtol=0, atol=1e-7)
            histories.append(history)
        margins, outside = torch.tensor(histories, dtype=DOUBLE).mean(dim=0)
        torch.testing.assert_close(result.history["margin"][:, image].double(), margins, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.history["excess"][:, image].double(), outside, rtol=1e-6, atol=1e-5)
    searched, tried, margins, _ = attack.search(Oracle(model, torch.arange(2)), images, Goal(labels))
    for place in range(3):
        expected = margin(model.undefended(tried[:, place]).detach(), Goal(labels))
        torch.testing.assert_close(margins[:, place].double(), expected, rtol=1e-4, atol=1e-4)
    assert searched.begin.shape == (2, 3, *SHAPE)
    assert searched.wrapper.settings == QUICK.replace(n_latents=3)
    assert model.settings == QUICK


@NORMS
@pytest.mark.parametrize("aimed", [False, True])
def test_what_is_surely_possible_is_found_and_stays_wrong_after_purification(norm: str, aimed: bool):
    model, images, labels = reachable()
    targets = (labels + 2) % 4 if aimed else None
    attack = LatentAttack(ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 1.2), steps=50, latents=2)
    result = attack(model, images, labels, targets=targets)
    for attempt in result.candidates.unbind(dim=1):
        assert (margin(model.undefended(attempt), Goal(labels, targets)) > 0).all()
    assert (result.history["margin"][0] < 0).all()
    assert (result.history["margin"][-1] > 5).all()
    assert (result.history["excess"][-1] < 0.05 * attack.threat.eps * (144 if norm == "linf" else 1)).all()
    assert result.any_candidate_success.all()
    assert result.success.all()


def last(column: str, step: int = -1, **options: Any) -> Tensor:
    """[B], the history of an attack with two latents on a generator that reaches everything, at a step."""
    return LatentAttack(latents=2, **options)(*reachable(2, 20)).history[column][step]
