"""The frozen residual: the change by a purification is kept for some steps, and attacked as a constant."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import (
    DOUBLE,
    NORMS,
    QUICK,
    SHAPE,
    THREATS,
    WEIGHT,
    Denoiser,
    Linear,
    labelled,
    precise,
    search_seeds,
    wrapped,
)
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import PGD, CrossEntropy, FrozenResidual, Goal, Loss, Margin, ThreatModel, VoteMargin
from cmap_defense.gradients import Detached, StraightThrough
from toys import noise


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
    options: Any = {"steps": 5, "every": every, "purifications": purifications, "memory": memory}
    attack = FrozenResidual(threat, random_start=False, seed=3, **options)
    result = attack(precise(), images, labels, targets=targets)
    model, weight = precise(), WEIGHT.float().double()
    for image in range(2):
        clean, goal = images[image], Goal(labels, targets).rows(slice(image, image + 1))
        own = (goal.labels if goal.targets is None else goal.targets).item()
        here, residuals, purified = clean.clone(), [], 0
        for step in range(5):
            if step % every == 0:
                for _ in range(purifications):
                    purified += 1
                    seed = search_seeds(range(2), 3, purified)[image : image + 1]
                    found = model.purify(here[None], seeds=seed).images[0].detach()
                    residuals.append([one - here for one in found])
                residuals = residuals[-(memory or purifications) :]
            assert len(residuals) == kept[step]
            leaf = here.clone().requires_grad_()
            logits = torch.stack([((leaf + r).flatten() - 0.5) @ weight for part in residuals for r in part])
            vote = logits.softmax(dim=1).mean(dim=0).log()
            best = torch.cat([vote[:own], vote[own + 1 :]]).max()
            loss = vote[own] - best if aimed else best - vote[own]
            (gradient,) = torch.autograd.grad(loss, leaf)
            reached = goal.reached(logits.argmax(dim=1, keepdim=True)).float().mean()
            history = {name: values[step, image].item() for name, values in result.history.items()}
            assert history["loss"] == pytest.approx(loss.item(), abs=1e-6)
            assert history["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-6)
            assert history["reached"] == pytest.approx(reached.item(), abs=1e-6)
            direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
            here = threat.project((here + threat.eps / 4 * direction)[None], clean[None])[0]
        torch.testing.assert_close(result.candidates[image, 0], here, rtol=0, atol=1e-7)
        assert purified == math.ceil(5 / every) * purifications
        assert result.queries == purified + 1


class Sized(Linear):
    """Keeps the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return super().forward(images)


@pytest.mark.parametrize("loss", [VoteMargin(), CrossEntropy(), Margin()], ids=repr)
@pytest.mark.parametrize("parallel", [None, 1, 2, 5, 21, 100])
def test_feedback_is_loss_and_gradient_of_the_residuals_written_out(loss: Loss, parallel: int | None):
    """In parts of as many images as the wrapper says; for a joint loss too, which no sum over parts is."""
    images, labels = labelled(3, dtype=DOUBLE)
    residuals = noise(7, 3, *SHAPE, seed=2, dtype=DOUBLE)
    attack, goal = FrozenResidual(ThreatModel(), loss=loss), Goal(labels)
    classifier = Sized().double()
    leaf = images.clone().requires_grad_()
    logits = torch.stack([Linear().double()(leaf + residual) for residual in residuals])
    value = loss(logits, goal)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    model = PurifiedClassifier(classifier, Denoiser().double(), settings=QUICK, max_parallel=parallel)
    found, finite = attack._feedback(model, images, residuals, goal)
    assert finite.all()
    torch.testing.assert_close(found.loss, value.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.gradient, gradient, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.reached, (logits.argmax(dim=2) != labels).float().mean(dim=0))
    assert not found.loss.requires_grad
    assert not found.gradient.requires_grad
    size = parallel or 256
    assert classifier.sizes == 2 * ([size] * (21 // size) + ([21 % size] if 21 % size else []))


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
    modes = (StraightThrough(), Detached())
    found = [ours(wrapped(gradient=mode), *labelled()).candidates for mode in modes]
    assert torch.equal(*found), "the gradient mode of the wrapper does not matter"


@pytest.mark.parametrize(
    ("steps", "every", "purifications", "restarts", "count"),
    [(5, 2, 3, 1, 9), (6, 10, 4, 1, 4), (3, 1, 2, 1, 6), (5, 2, 3, 2, 18)],
)
def test_queries_are_the_purifications(steps: int, every: int, purifications: int, restarts: int, count: int):
    attack = FrozenResidual(
        ThreatModel(), steps=steps, every=every, purifications=purifications, memory=2, restarts=restarts
    )
    model, seen = wrapped(), []
    model.register_step_hook(lambda state: seen.append(state.iteration), steps=[0])
    result = attack(model, *labelled(), reevaluations=2)
    assert result.queries == len(seen) == count + (restarts if restarts > 1 else 0) + 2
    assert set(result.history) == {"loss", "gradient_norm", "reached"}
    for values in result.history.values():
        assert values.shape == (restarts * steps, 3)
