"""The outcome for an image is its own: it hangs on the seed and the image's index, never on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import NAMES, THREATS, Denoiser, Linear, labelled, suite, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import PGD, AttackResult, ConsistencyDisruption, Transfer

INDEPENDENT = pytest.mark.parametrize("name", [name for name in NAMES if name != "ConsistencyDisruption released"])
TOLERANCE = {"rtol": 0, "atol": 1e-9}
"""All is in float64 here: products of matrices of other sizes differ in the last bits, and by no more."""


def model(**options: Any) -> PurifiedClassifier:
    return wrapped(classifier=Linear().double(), backbone=Denoiser().double(), **options)


def attacked(name: str, rows: list[int] | slice, norm: str = "linf", **options: Any) -> AttackResult:
    """An attack on some of four images that keep their numbers."""
    images, labels = labelled(4, dtype=torch.float64)
    indices = torch.arange(10, 14)[rows]
    attack = suite(THREATS[norm], seed=6, **options)[name]
    return attack(model(), images[rows], labels[rows], indices=indices, reevaluations=3)


def agree(part: AttackResult, whole: AttackResult, rows: list[int]) -> None:
    torch.testing.assert_close(part.images, whole.images[rows], **TOLERANCE)
    torch.testing.assert_close(part.candidates, whole.candidates[rows], **TOLERANCE)
    assert torch.equal(part.predictions, whole.predictions[:, rows])
    assert torch.equal(part.candidate_predictions, whole.candidate_predictions[rows])
    assert torch.equal(part.success, whole.success[rows])
    assert torch.equal(part.chosen, whole.chosen[rows])
    assert part.queries == whole.queries
    for name, values in part.history.items():
        torch.testing.assert_close(values, whole.history[name][:, rows], rtol=1e-6, atol=1e-7)


@INDEPENDENT
@pytest.mark.parametrize(("norm", "restarts"), [("linf", 1), ("l2", 2)])
def test_alone_in_a_batch_or_in_another_order(name: str, norm: str, restarts: int):
    whole = attacked(name, slice(None), norm, restarts=restarts)
    for rows in ([2], [3, 1, 0, 2]):
        agree(attacked(name, rows, norm, restarts=restarts), whole, rows)


@INDEPENDENT
def test_with_known_noise_too(name: str):
    agree(attacked(name, [2, 1], noise="known"), attacked(name, slice(None), noise="known"), [2, 1])


@INDEPENDENT
def test_without_indices_images_are_numbered(name: str):
    images, labels = labelled(2, dtype=torch.float64)
    attack = suite(THREATS["linf"])[name]
    numbered, other = (attack(model(), images, labels, indices=given) for given in ([0, 1], [1, 0]))
    plain = attack(model(), images, labels)
    assert torch.equal(plain.images, numbered.images)
    assert torch.equal(plain.predictions, numbered.predictions)
    assert (plain.candidates - other.candidates).abs().max() > 1e-6 or not torch.equal(plain.images, other.images)


@pytest.mark.parametrize(
    "name", ["PGD", "LatentAttack", "ConsistencyDisruption", "Overpowered", "FrozenResidual", "TargetSteer"]
)
def test_chunks_of_the_backbone_change_nothing(name: str):
    images, labels = labelled(3, dtype=torch.float64)
    attack = suite(THREATS["linf"])[name]
    whole = attack(model(), images, labels)
    for latents in (1, 3, 4):
        agree(attack(model(max_parallel=latents), images, labels), whole, [0, 1, 2])


def test_the_released_loss_depends_on_the_batch():
    """Its softmax runs over the images: the one slip that no index can undo."""
    name = "ConsistencyDisruption released"
    whole = attacked(name, slice(None))
    for rows in ([2], [0, 2]):
        part = attacked(name, rows)
        assert (part.candidates - whole.candidates[rows]).abs().flatten(1).amax(dim=1).min() > 1e-3
    agree(attacked(name, [3, 1, 0, 2]), whole, [3, 1, 0, 2])


def test_alone_the_released_softmax_is_one_everywhere_and_the_attack_is_blind():
    images, labels = labelled(1, dtype=torch.float64)
    found = [
        ConsistencyDisruption(THREATS["linf"], steps=8, released=True, beta=beta)(model(), images, labels).candidates
        for beta in (0.0, 1e6)
    ]
    torch.testing.assert_close(found[0], found[1], **TOLERANCE)


def test_source_and_model_are_seeded_alike_in_any_batch():
    images, labels = labelled(4, dtype=torch.float64)
    attack = Transfer(PGD(THREATS["l2"], steps=2), source=model(vote="soft"))
    whole = attack(model(), images, labels)
    agree(attack(model(), images[1:2], labels[1:2], indices=[1]), whole, [1])


def test_a_batch_of_copies_with_one_index_is_one_image():
    images, labels = labelled(1, dtype=torch.float64)
    for name in ("PGD", "LatentAttack", "ConsistencyDisruption"):
        attack = suite(THREATS["linf"])[name]
        result = attack(model(), images.repeat(2, 1, 1, 1), labels.repeat(2), indices=[7, 7])
        torch.testing.assert_close(result.images[0], result.images[1], **TOLERANCE)
        other = attack(model(), images.repeat(2, 1, 1, 1), labels.repeat(2), indices=[7, 8])
        assert (other.images[0] - other.images[1]).abs().max() > 1e-3


def test_the_index_counts_and_the_seed_counts():
    def start(indices: list[int], seed: int) -> Tensor:
        images, labels = labelled(2)
        return PGD(THREATS["linf"], steps=1, seed=seed)(model(), images.double(), labels, indices=indices).images

    assert (start([0, 1], 0) - start([2, 1], 0)).abs().flatten(1).amax(dim=1).gt(1e-3).tolist() == [True, False]
    assert (start([0, 1], 0) - start([0, 1], 1)).abs().flatten(1).amax(dim=1).gt(1e-3).all()
