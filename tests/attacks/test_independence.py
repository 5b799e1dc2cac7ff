"""The outcome for an image depends on the seed and the image's index, never on the batch or the chunks."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import DOUBLE, NAMES, THREATS, Denoiser, Linear, labelled, precise, suite, wrapped
from cmap_defense.attacks import PGD, AttackResult, ConsistencyDisruption, Transfer
from cmap_defense.purifiers import ADP, DiffPure, OneStep, Purifier

RELEASED = "ConsistencyDisruption released"
INDEPENDENT = pytest.mark.parametrize("name", [name for name in NAMES if name != RELEASED])
TOLERANCE = {"rtol": 0, "atol": 1e-9}
"""All is in float64 here: products of matrices of other sizes differ in the last bits, and by no more."""


def attacked(name: str, rows: list[int], norm: str = "linf", **options: Any) -> AttackResult:
    """An attack on some of three images that keep their indices."""
    images, labels = labelled(3, dtype=DOUBLE)
    attack = suite(THREATS[norm], seed=6, **options)[name]
    return attack(precise(), images[rows], labels[rows], indices=[10 + row for row in rows], reevaluations=2)


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
@pytest.mark.parametrize(("norm", "options"), [("linf", {}), ("l2", {"restarts": 2}), ("linf", {"noise": "known"})])
def test_alone_in_a_batch_or_in_another_order(name: str, norm: str, options: dict[str, Any]):
    whole = attacked(name, [0, 1, 2], norm, **options)
    for rows in ([1], [2, 0, 1]):
        agree(attacked(name, rows, norm, **options), whole, rows)


@INDEPENDENT
def test_chunks_of_the_backbone_change_nothing(name: str):
    images, labels = labelled(2, dtype=DOUBLE)
    attack = suite(THREATS["linf"])[name]
    whole = attack(precise(), images, labels)
    for latents in (1, 3):
        agree(attack(precise(max_parallel=latents), images, labels), whole, [0, 1])


@pytest.mark.parametrize(
    "purifier", [OneStep(level=0.3, n_latents=2), DiffPure(t=3, n_latents=2), ADP(iterations=2, n_latents=2)], ids=repr
)
@pytest.mark.parametrize("name", ["PGD", "PGD unrolled", "SPSA", "FrozenResidual"])
def test_behind_a_purifier_that_denoises(purifier: Purifier, name: str):
    def found(rows: list[int], **options: Any) -> AttackResult:
        backbone = Denoiser().double()
        backbone.kind = purifier.kind or "consistency"
        model = wrapped(classifier=Linear().double(), backbone=backbone, settings=None, purifier=purifier, **options)
        images, labels = labelled(3, dtype=DOUBLE)
        return suite(THREATS["linf"], seed=6)[name](model, images[rows], labels[rows], indices=rows)

    whole = found([0, 1, 2])
    agree(found([2, 0]), whole, [2, 0])
    agree(found([0, 1, 2], max_parallel=1), whole, [0, 1, 2])


def test_the_released_loss_depends_on_the_batch():
    """Its softmax runs over the images: the one bug that no index can undo. Of one image it is 1 everywhere."""
    whole = attacked(RELEASED, [0, 1, 2])
    for rows in ([2], [0, 2]):
        part = attacked(RELEASED, rows)
        assert (part.candidates - whole.candidates[rows]).abs().flatten(1).amax(dim=1).min() > 1e-3
    agree(attacked(RELEASED, [2, 0, 1]), whole, [2, 0, 1])
    blind = functools.partial(ConsistencyDisruption, THREATS["linf"], steps=8, released=True)
    images, labels = labelled(1, dtype=DOUBLE)
    found = [blind(beta=beta)(precise(), images, labels).candidates for beta in (0.0, 1e6)]
    torch.testing.assert_close(found[0], found[1], **TOLERANCE)


def test_source_and_model_are_seeded_alike_in_any_batch():
    images, labels = labelled(3, dtype=DOUBLE)
    attack = Transfer(PGD(THREATS["l2"], steps=2), source=precise(vote="soft"))
    whole = attack(precise(), images, labels)
    agree(attack(precise(), images[1:2], labels[1:2], indices=[1]), whole, [1])


def test_starts_depend_on_the_index_and_the_seed():
    def start(indices: list[int], seed: int) -> Tensor:
        images, labels = labelled(2, dtype=DOUBLE)
        return PGD(THREATS["linf"], steps=1, seed=seed)(precise(), images, labels, indices=indices).images

    def differ(first: Tensor, second: Tensor) -> list[bool]:
        return (first - second).abs().flatten(1).amax(dim=1).gt(1e-3).tolist()

    assert differ(start([0, 1], 0), start([2, 1], 0)) == [True, False]
    assert differ(start([0, 1], 0), start([0, 1], 1)) == [True, True]
