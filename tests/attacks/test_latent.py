"""Attacks on latents: the distance outside the ball, the descent, and the latent attack against plain loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import QUICK, SHAPE, THREATS, WEIGHT, labelled, search_seeds, wrapped
from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import Goal, LatentAttack, Overpowered, ThreatModel
from cmap_defense.attacks.goal import margin
from cmap_defense.attacks.latents import descend, excess, project_all
from cmap_defense.attacks.oracle import Oracle
from cmap_defense.errors import SettingsError
from toys import LinearBackbone, noise, uniform

SEEDS = st.integers(0, 2**31)
DOUBLE = torch.float64
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
FITTED = CMAPSettings(n_latents=2, iterations=60, learning_rate=0.1, latent_weight=0.0)

# ----------------------------------------------------------------------------------------------------- outside the ball


def scene(seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Images [2, 3, C, H, W] around clean ones [2, C, H, W]."""
    clean = uniform(2, 2, 3, 4, seed=seed, dtype=DOUBLE)
    return clean[:, None] + spread * noise(2, 3, 2, 3, 4, seed=seed + 1, dtype=DOUBLE), clean


@settings(max_examples=40)
@given(seed=SEEDS, spread=st.sampled_from([0.0, 0.01, 0.1, 1.0]), eps=st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_excess_written_out(seed: int, spread: float, eps: float):
    shown, clean = scene(seed, spread)
    linf, l2 = (excess(ThreatModel(norm=norm, eps=eps), shown, clean) for norm in ("linf", "l2"))
    for image in range(2):
        for attempt in range(3):
            gaps = [abs(value) for value in (shown[image, attempt] - clean[image]).flatten().tolist()]
            assert linf[image, attempt].item() == pytest.approx(sum(max(gap - eps, 0) for gap in gaps), abs=1e-12)
            length = sum(gap**2 for gap in gaps) ** 0.5
            assert l2[image, attempt].item() == pytest.approx(max(length - eps, 0) * (2 * 3 * 4) ** 0.5, abs=5e-6)


@settings(max_examples=40)
@given(seed=SEEDS, norm=st.sampled_from(["linf", "l2"]), spread=st.sampled_from([0.02, 0.1, 1.0]))
def test_excess_is_nothing_inside_and_something_outside(seed: int, norm: str, spread: float):
    shown, clean = scene(seed, spread)
    threat = ThreatModel(norm=norm, eps=0.15 if norm == "linf" else 0.6)
    far = torch.stack([threat.distance(part, clean) for part in shown.unbind(dim=1)], dim=1)
    assert torch.equal(excess(threat, shown, clean) > 0, far > threat.eps)


@NORMS
def test_excess_pulls_towards_the_ball_and_has_no_trouble_in_its_middle(norm: str):
    shown, clean = scene(1, 1.0)
    threat = ThreatModel(norm=norm, eps=0.1)
    leaf = shown.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(excess(threat, leaf, clean).sum(), leaf)
    delta = shown - clean[:, None]
    if norm == "linf":
        assert torch.equal(gradient, torch.where(delta.abs() > 0.1, delta.sign(), 0.0))
    else:
        direction = delta / delta.flatten(2).norm(dim=2)[:, :, None, None, None]
        torch.testing.assert_close(gradient, direction * (2 * 3 * 4) ** 0.5)
    middle = clean[:, None].repeat(1, 3, 1, 1, 1).requires_grad_()
    (still,) = torch.autograd.grad(excess(ThreatModel(norm=norm, eps=0.0), middle, clean).sum(), middle)
    assert torch.equal(still, torch.zeros_like(still))


@NORMS
def test_project_all_projects_each(norm: str):
    shown, clean = scene(1, 0.5)
    threat = ThreatModel(norm=norm, eps=0.2)
    for attempt in range(3):
        assert torch.equal(project_all(threat, shown, clean)[:, attempt], threat.project(shown[:, attempt], clean))


# ---------------------------------------------------------------------------------------------------------- the descent


@pytest.mark.parametrize("cuts", [[4], [1, 1, 2], [3, 1]])
def test_descent_in_parts_is_adam_on_each_image(cuts: list[int]):
    begin = noise(4, 2, *SHAPE, seed=1, dtype=DOUBLE)
    target = noise(4, 1, *SHAPE, seed=2, dtype=DOUBLE)
    steps_seen: list[int] = []

    def parts() -> Any:
        edges = [sum(cuts[:n]) for n in range(len(cuts) + 1)]
        return (slice(first, last) for first, last in itertools.pairwise(edges))

    def loss(latents: Tensor, rows: slice, step: int) -> Tensor:
        steps_seen.append(step)
        return (1 + step) * (latents - target[rows]).pow(4).flatten(1).sum(dim=1)

    kept = begin.clone()
    found = descend(begin, parts, loss, 5, lr=0.1, betas=(0.8, 0.95))
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


def test_descent_works_without_gradients_around_it():
    with torch.no_grad():
        found = descend(
            torch.ones(1, 1, 1, 1, 1),
            lambda: iter([slice(0, 1)]),
            lambda u, *_: u.square().flatten(1).sum(1),
            1,
            lr=0.5,
        )
    torch.testing.assert_close(found, torch.full((1, 1, 1, 1, 1), 0.5))


# ---------------------------------------------------------------------------------------------------- the latent attack


def plain_latent_attack(
    attack: LatentAttack, model: PurifiedClassifier, clean: Tensor, goal: Goal, begin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each latent alone, in the words of the docstring: the best legal image, the margins and the excess by step."""
    threat, backbone, classifier = attack.threat, model.backbone, model.classifier
    chosen, margins, outside = torch.empty_like(begin), [], []
    for image in range(len(clean)):
        one = goal.rows(slice(image, image + 1))
        for place in range(begin.shape[1]):
            latent = begin[image, place : place + 1].clone().requires_grad_()
            optimiser = torch.optim.Adam([latent], lr=attack.learning_rate)
            best, highest = clean[image], -float("inf")
            for step in range(attack.steps):
                shown = (backbone.generate(latent).clamp(-1, 1) + 1) / 2  # pyright: ignore[reportCallIssue]
                legal = threat.project(shown.detach(), clean[image : image + 1])
                now = margin(classifier(legal).detach(), one).item()
                if now > highest:
                    best, highest = legal[0], now
                delta = (shown[0] - clean[image]).flatten()
                if threat.norm == "linf":
                    far = (delta.abs() - threat.eps).clamp_min(0).sum()
                else:
                    far = (delta.norm() - threat.eps).clamp_min(0) * delta.numel() ** 0.5
                margins.append(now)
                outside.append(far.item())
                weight = attack.penalty * attack.growth ** (step / max(1, attack.steps - 1))
                loss = weight * far + (attack.confidence - margin(classifier(shown), one)[0]).clamp_min(0)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            chosen[image, place] = best
    shape = (*begin.shape[:2], attack.steps)
    by_step = [torch.tensor(values, dtype=DOUBLE).view(shape).mean(dim=1).T for values in (margins, outside)]
    return chosen, *by_step


@NORMS
@pytest.mark.parametrize("aimed", [False, True])
@pytest.mark.parametrize("start", ["purified", "noise"])
def test_against_a_plain_loop(norm: str, aimed: bool, start: str):
    images, labels = labelled(2, dtype=DOUBLE)
    targets = (labels + 1) % 4 if aimed else None
    goal = Goal(labels, targets)
    threat = ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 0.8)
    attack = LatentAttack(threat, steps=6, latents=3, start=start, penalty=0.5, growth=4.0, seed=3)
    model = wrapped()
    model.classifier.double()
    model.backbone.double()
    many = model.variant(settings=QUICK.replace(n_latents=3))
    begin = many.initial_latents(images, seeds=search_seeds(range(2), 3, 0))
    if start == "purified":
        begin = many.purify(images, seeds=search_seeds(range(2), 3, 1)).latents
    chosen, margins, outside = plain_latent_attack(attack, model, images, goal, begin)
    result = attack(model, images, labels, targets=targets)
    torch.testing.assert_close(result.candidates, chosen, rtol=0, atol=1e-7)
    torch.testing.assert_close(result.history["margin"].double(), margins, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.history["excess"].double(), outside, rtol=1e-6, atol=1e-5)
    assert result.queries == (1 if start == "purified" else 0) + 3 + 1


class Sharp(torch.nn.Module):
    """A steep linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHT.float())

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5) @ self.weight


def reachable(count: int = 3) -> tuple[PurifiedClassifier, Tensor, Tensor]:
    """A defence whose generator reaches every image near the clean ones, which it made itself."""
    backbone = LinearBackbone(SHAPE)
    model = wrapped(classifier=Sharp(), backbone=backbone, settings=FITTED)
    with torch.no_grad():
        images = (backbone.generate(noise(count, *SHAPE, seed=6)) + 1) / 2
        return model, images, model.undefended(images).argmax(dim=1)


@NORMS
@pytest.mark.parametrize("aimed", [False, True])
def test_what_is_surely_possible_is_found_and_stays_wrong_after_purification(norm: str, aimed: bool):
    model, images, labels = reachable()
    targets = (labels + 2) % 4 if aimed else None
    goal = Goal(labels, targets)
    attack = LatentAttack(ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 1.2), steps=60, latents=2)
    result = attack(model, images, labels, targets=targets)
    for attempt in result.candidates.unbind(dim=1):
        assert (margin(model.undefended(attempt), goal) > 0).all()
        assert (attack.threat.distance(attempt, images) <= attack.threat.eps * (1 + 1e-6)).all()
    assert (result.history["margin"][0] < 0).all()
    assert (result.history["margin"][-1] > 5).all()
    assert (result.history["excess"][-1] < 0.05 * attack.threat.eps * (144 if norm == "linf" else 1)).all()
    assert result.any_candidate_success.all()
    assert result.success.all()


def test_where_nothing_is_possible_the_history_says_so():
    model, images, labels = reachable()
    result = LatentAttack(ThreatModel(eps=1e-4), steps=30, latents=2, penalty=50.0)(model, images, labels)
    assert (result.history["margin"] < 0).all()
    assert not result.success.any()


@NORMS
def test_in_a_ball_of_no_size_the_clean_images_come_back(norm: str):
    images, labels = labelled()
    result = LatentAttack(ThreatModel(norm=norm, eps=0.0), steps=3, latents=2)(wrapped(), images, labels)
    assert torch.equal(result.images, images)
    assert torch.equal(result.candidates, images[:, None].expand(-1, 2, -1, -1, -1))
    clean = margin(wrapped().undefended(images).detach(), Goal(labels))
    torch.testing.assert_close(result.history["margin"], clean.expand(3, -1))
    assert (result.history["excess"] > 0).all()


def test_a_growing_penalty_ends_nearer():
    model, images, labels = reachable()
    ends = [
        LatentAttack(ThreatModel(eps=0.005), steps=40, latents=2, penalty=0.01, growth=growth)(
            model, images, labels
        ).history["excess"][-1]
        for growth in (1.0, 1000.0)
    ]
    assert (ends[1] < 0.6 * ends[0]).all()


def test_confidence_is_the_lead_that_is_asked_for():
    model, images, labels = reachable()
    leads = [
        LatentAttack(ThreatModel(eps=0.3), steps=60, latents=2, confidence=confidence)(model, images, labels).history[
            "margin"
        ][-1]
        for confidence in (0.0, 20.0)
    ]
    assert (leads[0] < 5).all()
    assert (leads[1] > 15).all()


def test_search_tells_the_margins_of_what_it_submits():
    model, images, labels = reachable()
    attack = LatentAttack(THREATS["linf"], steps=5, latents=3)
    found = attack.search(Oracle(model, torch.arange(3)), images, Goal(labels))
    for place in range(3):
        told = margin(model.undefended(found.images[:, place]).detach(), Goal(labels))
        torch.testing.assert_close(found.margins[:, place], told, rtol=1e-4, atol=1e-4)
    assert found.searched.begin.shape == (3, 3, *SHAPE)
    assert found.searched.wrapper.settings == FITTED.replace(n_latents=3)
    assert model.settings == FITTED


def test_starting_from_the_purification_is_nearer_than_from_noise():
    model, images, labels = reachable()
    first = [
        LatentAttack(ThreatModel(eps=0.01), steps=1, latents=2, start=start)(model, images, labels).history["excess"][0]
        for start in ("purified", "noise")
    ]
    assert (first[0] < 0.2 * first[1]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"latents": 0},
        {"start": "clean"},
        {"penalty": 0.0},
        {"penalty": float("nan")},
        {"confidence": -1.0},
    ],
    ids=repr,
)
@pytest.mark.parametrize("attack", [LatentAttack, Overpowered])
def test_wrong_settings_are_refused_by_name(attack: Any, change: dict[str, Any]):
    (name,) = change
    with pytest.raises(SettingsError, match=f"{attack.__name__}.{name}"):
        attack(ThreatModel(), **change)


def test_a_penalty_that_shrinks_is_refused():
    with pytest.raises(SettingsError, match=r"LatentAttack\.growth"):
        LatentAttack(ThreatModel(), growth=0.5)
