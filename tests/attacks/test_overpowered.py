"""Overpowered: pairs of generated images in one ball, one on each side of the decision boundary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import DOUBLE, NORMS, SHAPE, labelled, precise, reachable, search_seeds
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import Candidates, Goal, Overpowered, ThreatModel
from cmap_defense.attacks.goal import margin
from cmap_defense.attacks.oracle import Oracle
from toys import noise, uniform

EPS = {"linf": 0.06, "l2": 0.7}


def run(
    attack: Overpowered, goal: Goal, images: Tensor, model: PurifiedClassifier
) -> tuple[Candidates, Tensor, Tensor]:
    """The attempts, and the pairs [B, M, C, H, W] behind them: right and wrong."""
    found = attack.run(Oracle(model, torch.arange(len(images))), images, goal)
    wrong, middle = found.images.split(attack.latents, dim=1)
    return found, 2 * middle - wrong, wrong


def labels_of(model: PurifiedClassifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.undefended(images.flatten(0, 1).clamp(0, 1)).argmax(dim=1).view(images.shape[:2])


@NORMS
@pytest.mark.parametrize("aimed", [False, True])
@pytest.mark.parametrize("options", [{}, {"confidence": 2.0}, {"penalty": 0.01}, {"penalty": 30.0}], ids=repr)
def test_pairs_are_in_the_ball_within_eps_of_each_other_on_both_sides_of_the_boundary(
    norm: str, aimed: bool, options: dict[str, float]
):
    """The misclassified ones and the middles are the attempts. All are found where neither penalty is extreme."""
    model, images, labels = reachable(3, 20)
    goal = Goal(labels, (labels + 1) % 4 if aimed else None)
    attack = Overpowered(ThreatModel(norm=norm, eps=EPS[norm]), steps=50, latents=2, **options)
    found, right, wrong = run(attack, goal, images, model)
    eps, paired = attack.threat.eps, found.history["paired"]
    for near, far in zip(right.unbind(dim=1), wrong.unbind(dim=1), strict=True):
        for first, second in ((near, images), (far, images), (near, far)):
            assert (attack.threat.distance(first, second) <= eps * (1 + 1e-3)).all()
    assert paired[-1].mean() > 0
    if "penalty" in options:
        return
    assert (paired[0] == 0).all()
    assert (paired[-1] == 1).all()
    assert (labels_of(model, right) == labels[:, None]).all()
    assert goal.reached(labels_of(model, wrong).T).all()
    gaps = torch.stack([attack.threat.distance(*pair) for pair in zip(right.unbind(1), wrong.unbind(1), strict=True)])
    assert (gaps > 0.4 * eps).all()
    middle = found.images[:, 2:]
    leads = [margin(model.undefended(part[:, 0].clamp(0, 1)).detach(), goal) for part in (right, middle, wrong)]
    assert (leads[0] < leads[2]).all()
    assert (leads[1] < leads[2]).all()


@NORMS
def test_attempts_and_queries_and_no_pair_where_no_boundary_is(norm: str):
    model, images, labels = reachable()
    result = Overpowered(ThreatModel(norm=norm, eps=EPS[norm]), steps=50, latents=3)(model, images, labels)
    assert result.candidates.shape == (3, 6, *SHAPE)
    assert result.any_candidate_success.all()
    assert result.queries == 1 + 6 + 1
    result = Overpowered(ThreatModel(norm=norm, eps=1e-4), steps=20, latents=2)(model, images, labels)
    assert (result.history["paired"] == 0).all()
    assert not result.success.any()


def plainly_projected(norm: str, eps: float, image: Tensor, centre: Tensor) -> Tensor:
    """The nearest in the ball and the cube, of a single image."""
    delta = image - centre
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, delta.new_tensor(-eps)), delta.new_tensor(eps))
    elif delta.square().sum().sqrt() > eps:
        delta = delta * eps / delta.square().sum().sqrt()
    return (centre + delta).clamp(0, 1)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), norm=st.sampled_from(["linf", "l2"]), spread=st.sampled_from([0.01, 0.1, 1.0]))
def test_a_legal_pair_is_in_the_ball_around_the_clean_image_and_within_eps_of_each_other(
    seed: int, norm: str, spread: float
):
    """Near ones are left as they are; of the rest the right one moves first, and the wrong one to it."""
    clean = uniform(2, *SHAPE, seed=seed, dtype=DOUBLE)
    right, wrong = (
        (clean[:, None] + spread * noise(2, 3, *SHAPE, seed=seed + n, dtype=DOUBLE)).clamp(0, 1) for n in (1, 2)
    )
    threat = ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 1.0)
    found = Overpowered(threat, latents=3)._legal(right, wrong, clean)
    for image in range(2):
        for place in range(3):
            near = plainly_projected(norm, threat.eps, right[image, place], clean[image])
            far = plainly_projected(norm, threat.eps, wrong[image, place], near)
            far = plainly_projected(norm, threat.eps, far, clean[image])
            torch.testing.assert_close(found[0][image, place], near, rtol=0, atol=1e-12)
            torch.testing.assert_close(found[1][image, place], far, rtol=0, atol=1e-12)
            for first, second in ((near, clean[image]), (far, clean[image]), (far, near)):
                gap = threat.distance(first[None], second[None])
                assert (gap <= threat.eps * (1 + 1e-12)).all()
    if spread == 0.01:
        torch.testing.assert_close(found[0], right, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], wrong, rtol=0, atol=1e-12)


@NORMS
def test_against_a_plain_loop(norm: str):
    images, labels = labelled(2, dtype=DOUBLE)
    model = precise()
    threat = ThreatModel(norm=norm, eps=EPS[norm])
    result = Overpowered(threat, steps=5, latents=2, penalty=0.6, confidence=3.0, seed=3)(model, images, labels)
    begin = model.purify(images, seeds=search_seeds(range(2), 3, 1)).latents
    for image in range(2):
        one = Goal(labels[image : image + 1])
        for place in range(2):
            pair = [begin[image, place : place + 1].clone().requires_grad_() for _ in range(2)]
            optimiser = torch.optim.Adam(pair, lr=0.05)
            for _ in range(5):
                near, far = ((model.backbone.generate(u) + 1) / 2 for u in pair)
                outside = 0
                for first, second in ((near, images[image]), (far, images[image]), (far, near)):
                    delta = (first - second).flatten()
                    if norm == "linf":
                        outside = outside + (delta.abs() - threat.eps).clamp_min(0).sum()
                    else:
                        length = (delta.square().sum() + 1e-12).sqrt()
                        outside = outside + (length - threat.eps).clamp_min(0) * delta.numel() ** 0.5
                lead = -margin(model.classifier(near), one)[0]
                gain = margin(model.classifier(far), one)[0]
                loss = 0.6 * outside + (3.0 - lead).clamp_min(0) + (3.0 - gain).clamp_min(0)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            with torch.no_grad():
                near, far = ((model.backbone.generate(u) + 1) / 2 for u in pair)
                near = plainly_projected(norm, threat.eps, near, images[image])
                far = plainly_projected(norm, threat.eps, far, near)
                far = plainly_projected(norm, threat.eps, far, images[image])
            torch.testing.assert_close(result.candidates[image, place], far[0], rtol=0, atol=1e-7)
            torch.testing.assert_close(result.candidates[image, 2 + place], (near + far)[0] / 2, rtol=0, atol=1e-7)
