"""From lines to figures: against counting by hand, and against what chance is known to do."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.common.statistics import Accuracy
from cmap_defense.evaluation import summary, wilson_interval
from cmap_defense.evaluation.summary import MEASURES, Runs, WorstCase, make_row
from evaluated import lines_of, runs_of

CLASSES = 3


@st.composite
def made_up(draw: st.DrawFn, attacks: int = 1) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Of each attack N and R predicted classes of B images in S runs; and the true classes."""
    runs, images = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    predictions, again = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
    return (
        [numbers.integers(0, CLASSES, (runs, images, predictions)) for _ in range(attacks)],
        [numbers.integers(0, CLASSES, (runs, images, again)) for _ in range(attacks)],
        numbers.integers(0, CLASSES, images),
    )


def given_runs(predictions: np.ndarray, again: np.ndarray, truth: np.ndarray, **more: Any) -> Runs:
    return Runs.of(lines_of(torch.from_numpy(predictions), torch.from_numpy(again), torch.from_numpy(truth), **more))


def worst_case(attacks: list[Runs], clean: Runs, draws: int = 1) -> WorstCase:
    """With few draws of what chance does where that is not tested."""
    return summary.worst_case(attacks, clean, draws)


def vote(predictions: np.ndarray) -> int:
    """The most frequent, of several the lowest."""
    counts = Counter(predictions.tolist())
    return min(label for label, count in counts.items() if count == max(counts.values()))


def assert_accuracy(found: Accuracy | None, shares: np.ndarray) -> None:
    """shares: [S, B]."""
    assert found is not None
    assert found.total == shares.shape[1]
    assert found.value == pytest.approx(shares.mean(), abs=1e-9)
    assert found.interval == pytest.approx(wilson_interval(shares.mean() * found.total, found.total), abs=1e-8)


@settings(max_examples=50)
@given(made=made_up())
def test_a_row_is_what_counting_gives(made: tuple[list[np.ndarray], list[np.ndarray], np.ndarray]) -> None:
    (predictions,), (again,), truth = made
    row = make_row(given_runs(predictions, again, truth, attack="pgd"))
    right, right_again = predictions == truth[:, None], again == truth[:, None]
    votes = np.array([[vote(image) for image in run] for run in predictions])
    shares = {
        "one_shot": right[:, :, 0].astype(float),
        "average": right.mean(axis=2),
        "worst_of": right.all(axis=2).astype(float),
        "vote": (votes == truth).astype(float),
        "reevaluated": right_again.mean(axis=2),
    }
    assert tuple(shares) == MEASURES
    for name, values in shares.items():
        assert_accuracy(getattr(row, name), values)
        if len(predictions) > 1:
            assert row.spread[name] == pytest.approx(values.mean(axis=1).std(ddof=1), abs=1e-12)
    assert set(row.spread) == (set(MEASURES) if len(predictions) > 1 else set())
    single = right_again.mean(axis=1)  # [S, R]
    expected = single.std(axis=1, ddof=1).mean() if single.shape[1] > 1 else 0.0
    assert row.prediction_spread == pytest.approx(expected, abs=1e-12)
    assert (row.model, row.attack, row.images, row.runs) == ("defended", "pgd", len(truth), len(predictions))
    assert (row.one_latent, row.search, row.queries, row.distance) == (None, None, None, None)


def test_what_else_a_row_has() -> None:
    predictions, again = torch.ones(2, 3, 1, dtype=torch.bool), torch.ones(2, 3, 1, dtype=torch.bool)
    row = make_row(
        runs_of(
            predictions,
            again,
            one_latent=lambda run, image: 0.1 * run + 0.25 * image,
            distance=lambda run, image: 0.01 * run + 0.1 * image,
            queries=17,
        )
    )
    assert row.one_latent == pytest.approx(0.25 + 0.05)
    assert row.distance == pytest.approx(0.21)
    assert row.queries == 17


def test_accuracy_while_searching_and_by_chance() -> None:
    """As many predictions of the clean image as the search makes: three here, of N + R + search = 5."""
    truth = torch.tensor([1, 1, 1, 1])
    found = [True, False, True, False, False, False, True, False]
    attack = Runs.of(
        lines_of(
            torch.ones(2, 4, 1),
            torch.ones(2, 4, 1),
            truth,
            search_predictions=3,
            search_succeeded=lambda r, b: found[4 * r + b],
        )
    )
    clean = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).expand(2, 4, 5)
    clean = Runs.of(lines_of(clean[:, :, :1], clean[:, :, 1:2], truth, search=lambda r, b: clean[r, b, 2:].tolist()))
    row = make_row(attack, clean)
    assert_accuracy(row.search, 1 - np.array(found, dtype=float).reshape(2, 4))
    assert_accuracy(row.search_on_clean, np.array([[1.0, 0.0, 0.0, 1.0]]))
    assert row.search_predictions == 3
    alone = make_row(attack)
    assert (alone.search, alone.search_on_clean, alone.search_predictions) == (row.search, None, 3)


def worst_by_hand(
    predictions: list[np.ndarray], again: list[np.ndarray], truth: np.ndarray
) -> tuple[np.ndarray, Counter]:
    """[S, B] shares of the R predictions under the attack with the smallest share of the N; of equal ones under that
    with the smallest share over all images and runs. And which attacks those are."""
    shares = [(part == truth[:, None]).mean(axis=2) for part in predictions]
    over_all = [share.mean() for share in shares]
    counted = np.empty(shares[0].shape)
    chosen: Counter = Counter()
    for run, image in np.ndindex(*counted.shape):
        worst = min(range(len(predictions)), key=lambda m: (shares[m][run, image], over_all[m]))
        counted[run, image] = (again[worst][run, image] == truth[image]).mean()
        chosen[f"attack-{worst}"] += 1
    return counted, chosen


def separate(made: tuple[list[np.ndarray], list[np.ndarray], np.ndarray]) -> bool:
    """Whether no two attacks are equally strong over all images."""
    predictions, _, truth = made
    strengths = {int((part == truth[:, None]).sum()) for part in predictions}
    return len(strengths) == len(predictions)


@settings(max_examples=50)
@given(made=made_up(attacks=3).filter(separate))
def test_the_worst_case_is_what_counting_gives(made: tuple[list[np.ndarray], list[np.ndarray], np.ndarray]) -> None:
    predictions, again, truth = made
    runs = [given_runs(predictions[m], again[m], truth, attack=f"attack-{m}") for m in range(3)]
    found = worst_case(runs, runs[0])
    counted, chosen = worst_by_hand(predictions, again, truth)
    assert_accuracy(found.by_image, counted)
    rows = {f"attack-{m}": (again[m] == truth[:, None]).mean(axis=2) for m in range(3)}
    if found.single is not None:
        counted = rows[found.single]
    assert_accuracy(found.accuracy, counted)
    assert {name: count for name, count in found.chosen.items() if count} == dict(chosen)
    assert set(found.chosen) == {"attack-0", "attack-1", "attack-2"}
    votes = np.array([[[vote(image) for image in run] for run in part] for part in predictions])
    assert_accuracy(found.lowest, (votes == truth).all(axis=0).astype(float))
    if len(counted) == 1:
        assert found.spread is None
    else:
        assert found.spread == pytest.approx(counted.mean(axis=1).std(ddof=1), abs=1e-12)


@settings(max_examples=50)
@given(made=made_up(attacks=4), clean=st.integers(0, 3))
def test_no_row_is_below_the_headline(made: tuple[list[np.ndarray], list[np.ndarray], np.ndarray], clean: int) -> None:
    """Not by the last digit either; and it is one of the accuracies that it can be."""
    predictions, again, truth = made
    runs = [given_runs(predictions[m], again[m], truth, attack=f"attack-{m}") for m in range(4)]
    clean = runs.pop(clean)
    found = worst_case(runs, clean)
    rows = {part.attack: make_row(part).reevaluated for part in (*runs, clean)}
    assert all(found.accuracy.value <= row.value for row in rows.values())
    assert found.accuracy == (found.by_image if found.single is None else rows[found.single])


def test_one_attack_that_is_lower_than_the_choice_of_the_worst_is_the_headline() -> None:
    """Both are equally strong by the predictions that choose, image by image, and the other one by those that count."""
    right = torch.tensor([[[1, 0], [1, 1]]]).bool()
    weak = runs_of(right, torch.tensor([[[1], [1]]]).bool(), attack="weak")
    strong = runs_of(right.flip(1), torch.tensor([[[0], [0]]]).bool(), attack="strong")
    clean = runs_of(right, torch.tensor([[[1], [1]]]).bool(), attack="clean")
    found = worst_case([weak, strong], clean)
    assert (found.by_image, found.accuracy, found.single) == (Accuracy(1, 2), Accuracy(0, 2), "strong")
    assert found.chosen == {"weak": 1, "strong": 1}


def test_attacks_that_help_leave_the_clean_images() -> None:
    right, wrong = torch.ones(1, 4, 3, dtype=torch.bool), torch.zeros(1, 4, 3, dtype=torch.bool)
    found = worst_case([runs_of(right, right)], runs_of(right, wrong, attack="clean"))
    assert (found.accuracy, found.single) == (Accuracy(0, 4), "clean")


@settings(max_examples=50)
@given(made=made_up(attacks=4).filter(separate), order=st.permutations(range(4)))
def test_the_order_of_the_attacks_changes_nothing(
    made: tuple[list[np.ndarray], list[np.ndarray], np.ndarray], order: list[int]
) -> None:
    predictions, again, truth = made
    runs = [given_runs(predictions[m], again[m], truth, attack=f"attack-{m}") for m in range(4)]
    found, other = worst_case(runs, runs[0]), worst_case([runs[m] for m in order], runs[0])
    assert other.by_image.value == pytest.approx(found.by_image.value, abs=1e-12)
    assert other.accuracy.value == pytest.approx(found.accuracy.value, abs=1e-12)
    assert dict(other.chosen) == dict(found.chosen)
    assert other.lowest == found.lowest


@settings(max_examples=50)
@given(made=made_up(attacks=2))
def test_one_attack_is_its_own_worst_case(made: tuple[list[np.ndarray], list[np.ndarray], np.ndarray]) -> None:
    predictions, again, truth = made
    runs = given_runs(predictions[0], again[0], truth)
    found = worst_case([runs], runs)
    assert found.accuracy.value == pytest.approx(make_row(runs).reevaluated.value, abs=1e-12)
    assert found.lowest == make_row(runs).vote
    assert found.chosen == {"pgd": predictions[0].shape[0] * len(truth)}


def draws(share: float, *shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def test_the_selection_effect_is_not_counted() -> None:
    """Attacks that do nothing at all, on a model that is right in 70 % of its predictions. The worst of eight,
    chosen by three predictions each, is right in 70 % of the further ones; the votes that chose are nearly all lost
    somewhere."""
    share, attacks, images, predictions = 0.7, 8, 2000, 3
    runs = [
        runs_of(
            draws(share, 1, images, predictions, seed=m), draws(share, 1, images, 4, seed=100 + m), attack=f"attack-{m}"
        )
        for m in range(attacks)
    ]
    clean = runs_of(draws(share, 1, images, predictions, seed=200), draws(share, 1, images, 4, seed=201))
    found = worst_case(runs, clean)
    error = math.sqrt(share * (1 - share) / (4 * images))
    assert found.accuracy.value == pytest.approx(share, abs=4 * error)
    chosen_by = torch.stack([run.right.double().mean(dim=2) for run in runs]).amin(dim=0).mean().item()
    assert chosen_by < share / 2

    won = share**3 + 3 * share**2 * (1 - share)
    error = math.sqrt(won**attacks / images)
    assert found.lowest.value == pytest.approx(won**attacks, abs=4 * error)
    assert found.lowest.value < share / 2
    assert sum(found.chosen.values()) == images
    assert min(found.chosen.values()) > 0


def vote_is_won(share: float, predictions: int, *, ties: bool) -> float:
    """That most of N predictions are right, each with this probability; on ties the vote is won or not."""
    chances = [math.comb(predictions, n) * share**n * (1 - share) ** (predictions - n) for n in range(predictions + 1)]
    return sum(chance for n, chance in enumerate(chances) if 2 * n > predictions or (ties and 2 * n == predictions))


@pytest.mark.parametrize(("predictions", "right"), [(1, 1), (3, 2), (4, 3), (4, 2), (5, 4), (6, 0), (10, 8)])
@pytest.mark.parametrize("attacks", [2, 3])
@pytest.mark.parametrize("truth", [0, 1])
def test_chance_is_the_binomials_where_all_images_are_alike(
    predictions: int, right: int, attacks: int, truth: int
) -> None:
    """Votes are drawn from the N predictions of the clean image, which do not suffice; of two classes the lower one
    wins ties."""
    images = 40
    labels = torch.full((1, images, predictions), 1 - truth)
    labels[:, :, :right] = truth
    clean = Runs.of(lines_of(labels, labels[:, :, :1], torch.full((images,), truth)))
    found = worst_case([clean] * attacks, clean, 1000).lowest_by_chance
    expected = vote_is_won(right / predictions, predictions, ties=truth == 0) ** attacks
    error = math.sqrt(expected * (1 - expected) / (1000 * images))
    assert found == pytest.approx(expected, abs=4.5 * error + 1e-12)


def test_chance_is_the_mean_over_images_and_runs() -> None:
    right = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[0, 0, 0], [1, 0, 0]]]).bool()
    clean = runs_of(right, right)
    shares = [vote_is_won(share, 3, ties=False) ** 2 for share in (1, 2 / 3, 0, 1 / 3)]
    found = worst_case([clean] * 2, clean, 1000).lowest_by_chance
    assert found == pytest.approx(sum(shares) / 4, abs=0.02)
    assert worst_case([clean] * 2, clean, 1000).lowest_by_chance == found
