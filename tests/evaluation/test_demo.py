"""Which images of the demonstration are shown."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.cli import demo as command
from cmap_defense.cmap.voting import count_votes, majority_label
from cmap_defense.evaluation.demo import Demonstration, over_margin
from cmap_defense.results import History, PurificationResult
from toys import noise, uniform

CLASSES = 3


def result_of(count: int, n_latents: int, seed: int) -> PurificationResult:
    logits = 2 * noise(count, n_latents, CLASSES, seed=seed)
    images = uniform(count, n_latents, 1, 5, 4, seed=seed)
    return PurificationResult(images, images, logits=logits, votes=count_votes(logits), labels=majority_label(logits))


@given(count=st.integers(1, 30), n_latents=st.integers(1, 6), shown=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_what_is_shown_is_right_as_often_as_all_are(count: int, n_latents: int, shown: int, seed: int) -> None:
    shown = min(shown, count)
    result, labels = result_of(count, n_latents, seed), torch.arange(count) % CLASSES
    rows = over_margin(result, labels, shown)
    assert len(set(rows.tolist())) == shown
    right = result.labels == labels
    assert abs(right[rows].double().mean() - right.double().mean()) <= 1 / shown + 1e-9


def test_the_largest_margins_come_first_and_right_ones_before_wrong_ones() -> None:
    """Of four votes for classes 0, 1 and 2, where 0 is the truth; the third is a tie that the mean probability wins."""
    votes = [[1, 3, 0], [4, 0, 0], [2, 2, 0], [3, 1, 0], [0, 4, 0], [2, 2, 0]]
    strength = [1.0, 1.0, 2.0, 1.0, 1.0, 0.5]
    logits = torch.zeros(6, 4, CLASSES)
    for row, counts in enumerate(votes):
        place = 0
        for label, count in enumerate(counts):
            logits[row, place : place + count, label] = strength[row] if label == 0 else 1.0
            place += count
    result = PurificationResult(logits, logits, logits=logits, votes=count_votes(logits), labels=majority_label(logits))
    labels = torch.zeros(6, dtype=torch.int64)
    assert over_margin(result, labels, 6).tolist() == [1, 3, 2, 5, 0, 4]
    assert over_margin(result, labels, 3).tolist() == [3, 5, 4]


def test_the_sheet_shows_those_images_and_a_version_that_the_caption_is_true_of(monkeypatch) -> None:
    result, count = result_of(9, 4, 1), 9
    assert result.labels is not None
    assert result.logits is not None
    clean = uniform(count, 1, 5, 4, seed=5)
    attacked = (clean + 0.1).clamp(0, 1)
    history = History(*torch.zeros(6, 2, count))
    labels = torch.arange(count) % CLASSES
    shown = Demonstration(
        clean, attacked, labels, result, result, {"attacked": labels}, {}, {}, history, history, seconds=1.0
    )
    given = {}
    monkeypatch.setattr(command, "image_sheet", lambda *arguments: given.update(enumerate(arguments)))
    monkeypatch.setattr(command, "CLASS_NAMES", tuple("abc"))
    command._sheet(shown, 0.1)
    columns, captions = given[0], given[1]
    assert len(captions) == command.SHOWN
    for place, row in enumerate(over_margin(result, labels, command.SHOWN).tolist()):
        assert torch.equal(columns["input"][place], clean[row])
        assert torch.equal(columns["attacked"][place], attacked[row])
        assert captions[place][0] == f"true: {'abc'[labels[row]]}"
        assert captions[place][3] == f"vote: {'abc'[result.labels[row]]}"
        agreeing = result.images[row][result.logits[row].argmax(dim=1) == result.labels[row]]
        distances = (agreeing - attacked[row]).abs().flatten(1).sum(dim=1)
        assert torch.equal(columns["purified"][place], agreeing[distances.argmin()])
