"""Eq. 14 and the answer built on it: symmetries, ties, gradients, and the cases at the edge."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense.cmap.voting import (
    count_votes,
    log_mean_probability,
    majority_label,
    nearest_voter,
    vote_logits,
    vote_margin,
)
from toys import noise

SEEDS = st.integers(0, 2**31)
SHAPES = st.tuples(st.integers(2, 4), st.integers(1, 8), st.integers(2, 7))
"""(B, K, classes)."""


def spread(shape: tuple[int, int, int], seed: int, *, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits without ties among probabilities; ties among votes are frequent."""
    return scale * noise(*shape, seed=seed, dtype=dtype)


@st.composite
def coarse_logits(draw: st.DrawFn) -> Tensor:
    """Logits from few values, -inf and 1e4 among them, with ties of every kind; each row has a finite entry."""
    batch, n_latents, classes = draw(SHAPES)
    value = st.sampled_from([0.0, 0.0, 1.0, 2.0, -1e4, 1e4, -math.inf])
    rows = draw(
        st.lists(
            st.lists(value, min_size=classes, max_size=classes).filter(lambda row: max(row) > -math.inf),
            min_size=batch * n_latents,
            max_size=batch * n_latents,
        )
    )
    return torch.tensor(rows).view(batch, n_latents, classes)


def shuffled(order, count: int) -> list[int]:
    return order.sample(range(count), count)


def loop_label(rows: list[list[float]]) -> int:
    """Eq. 14 for one image, counted by hand: most votes, then higher mean probability, then lower index."""
    classes = len(rows[0])
    votes, probability = [0] * classes, [0.0] * classes
    for row in rows:
        votes[row.index(max(row))] += 1
        exponentials = [math.exp(value - max(row)) for value in row]
        for c in range(classes):
            probability[c] += exponentials[c] / sum(exponentials)
    best = 0
    for c in range(1, classes):
        if (votes[c], probability[c]) > (votes[best], probability[best]):
            best = c
    return best


# ------------------------------------------------------------------------------------------------------- symmetries


ANY_LOGITS = coarse_logits() | st.builds(spread, SHAPES, SEEDS)


@settings(deadline=None, max_examples=100)
@given(logits=ANY_LOGITS, order=st.randoms(use_true_random=False))
def test_the_answer_does_not_depend_on_the_order_of_the_latents(logits: Tensor, order):
    permuted = logits[:, shuffled(order, logits.shape[1])]
    assert torch.equal(majority_label(permuted), majority_label(logits))
    assert torch.equal(count_votes(permuted), count_votes(logits))
    torch.testing.assert_close(vote_logits(permuted), vote_logits(logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        [[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]],
        [[2.0, 0.0], [0.0, 2.0], [2.0, 1.0], [1.0, 2.0]],
        [[2.0, 0.0, 2.0], [2.0, 2.0, 1.0], [0.0, 2.0, 2.0], [1.0, 1.0, 0.0]],
    ],
)
def test_every_order_of_latents_with_an_exact_tie_has_the_same_vote_logits(rows: list[list[float]]):
    """Here the rounding of one order or another must not decide whether the label is lifted."""
    answers = torch.cat([vote_logits(torch.tensor([order])) for order in itertools.permutations(rows)])
    torch.testing.assert_close(answers, answers[:1].expand_as(answers), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(shape=SHAPES, seed=SEEDS, order=st.randoms(use_true_random=False))
def test_relabelling_the_classes_relabels_the_answer(shape, seed: int, order):
    logits = spread(shape, seed)
    permutation = shuffled(order, shape[2])
    relabelled = logits[:, :, permutation]
    old_name = torch.tensor(permutation)
    assert torch.equal(old_name[majority_label(relabelled)], majority_label(logits))
    assert torch.equal(count_votes(relabelled), count_votes(logits)[:, permutation])
    torch.testing.assert_close(vote_logits(relabelled), vote_logits(logits)[:, permutation], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, seed=SEEDS)
def test_answer_of_a_batch_is_the_answers_of_its_images(shape, seed: int):
    logits = spread(shape, seed)
    alone = torch.cat([vote_logits(logits[b : b + 1]) for b in range(shape[0])])
    torch.testing.assert_close(vote_logits(logits), alone, rtol=1e-6, atol=1e-6)
    assert majority_label(logits).tolist() == [majority_label(logits[b : b + 1]).item() for b in range(shape[0])]


# ------------------------------------------------------------------------------------------------- label and votes


@settings(deadline=None, max_examples=50)
@given(shape=SHAPES, seed=SEEDS)
def test_label_is_the_brute_force_count(shape, seed: int):
    logits = spread(shape, seed)
    assert majority_label(logits).tolist() == [loop_label(rows) for rows in logits.tolist()]


@settings(deadline=None, max_examples=50)
@given(logits=coarse_logits())
def test_votes_are_one_per_latent_for_the_first_of_its_top_classes(logits: Tensor):
    votes = count_votes(logits)
    assert votes.dtype == torch.int64
    for row, rows in zip(votes.tolist(), logits.tolist(), strict=True):
        tops = [latent.index(max(latent)) for latent in rows]
        assert row == [tops.count(c) for c in range(logits.shape[2])]
    own = votes.gather(1, majority_label(logits)[:, None])[:, 0]
    assert torch.equal(own, votes.max(dim=1).values), "the label has the most votes"


def test_majority_beats_a_higher_mean_probability():
    logits = torch.tensor([[[0.1, 0.0], [0.1, 0.0], [0.0, 9.0]], [[0.0, 0.1], [9.0, 0.0], [0.0, 0.1]]])
    assert majority_label(logits).tolist() == [0, 1]
    assert log_mean_probability(logits).argmax(dim=1).tolist() == [1, 0]


def test_equal_votes_go_to_the_higher_mean_probability():
    logits = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]], [[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
    assert count_votes(logits).tolist() == [[1, 1, 0], [1, 0, 1]]
    assert majority_label(logits).tolist() == [0, 2]


def test_equal_votes_and_probabilities_go_to_the_lower_index():
    """Mirror images of one another: the probabilities are the same to the last bit."""
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[0.0, 5.0], [5.0, 0.0]]])
    assert majority_label(logits).tolist() == [0, 0]
    beside = torch.full((2, 2, 1), -torch.inf)
    assert majority_label(torch.cat([beside, logits, beside], dim=2)).tolist() == [1, 1]


def test_a_class_without_votes_does_not_win_a_tie_by_its_probability():
    logits = torch.tensor([[[2.0, 0.0, 1.9], [0.0, 2.0, 1.9]], [[1.9, 2.0, 0.0], [1.9, 0.0, 2.0]]])
    assert log_mean_probability(logits).argmax(dim=1).tolist() == [2, 0]
    assert majority_label(logits).tolist() == [0, 1]


def test_probabilities_that_float32_cannot_tell_apart_decide_a_tie():
    """Means that differ by about 1e-9: a float32 sum has them equal."""
    logits = torch.tensor([[[20.0, 0.0], [0.0, 20.5]], [[0.0, 20.0], [20.5, 0.0]]])
    assert count_votes(logits).tolist() == [[1, 1], [1, 1]]
    assert majority_label(logits).tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------------- vote_logits


@settings(deadline=None, max_examples=50)
@given(logits=coarse_logits())
def test_argmax_of_vote_logits_is_the_label_whatever_the_ties(logits: Tensor):
    before = logits.clone()
    assert torch.equal(vote_logits(logits).argmax(dim=1), majority_label(logits))
    assert torch.equal(logits, before)


@settings(deadline=None, max_examples=50)
@given(
    shape=SHAPES,
    seed=SEEDS,
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_argmax_of_vote_logits_is_the_label_in_every_precision(shape, seed: int, scale: float, dtype: torch.dtype):
    logits = spread(shape, seed, dtype=torch.float64).clamp(-5, 5).mul(scale).to(dtype)
    assert torch.equal(vote_logits(logits).argmax(dim=1), majority_label(logits))


@settings(deadline=None, max_examples=50)
@given(logits=coarse_logits())
def test_vote_logits_and_their_gradient_are_finite(logits: Tensor):
    logits = logits.requires_grad_()
    values = vote_logits(logits)
    assert torch.isfinite(values).all()
    (gradient,) = torch.autograd.grad(F.cross_entropy(values, majority_label(logits)), logits)
    assert torch.isfinite(gradient).all()


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, seed=SEEDS)
def test_log_mean_probability_is_the_formula(shape, seed: int):
    logits = spread(shape, seed, dtype=torch.float64)
    expected = logits.softmax(dim=-1).mean(dim=1).log()
    torch.testing.assert_close(log_mean_probability(logits), expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(logits=coarse_logits())
def test_without_lift_the_answer_is_the_log_mean_probability_exactly(logits: Tensor):
    assert torch.equal(vote_logits(logits, lift=False), log_mean_probability(logits))


@settings(deadline=None, max_examples=50)
@given(shape=SHAPES, seed=SEEDS)
def test_lift_changes_the_label_alone_and_only_where_it_is_not_on_top(shape, seed: int):
    logits = spread(shape, seed)
    soft, voted, label = log_mean_probability(logits), vote_logits(logits), majority_label(logits)
    is_label = F.one_hot(label, shape[2]).bool()
    assert torch.equal(voted[~is_label], soft[~is_label])
    on_top = soft.argmax(dim=1) == label
    assert torch.equal(voted[on_top], soft[on_top])
    assert (voted[is_label] >= soft[is_label]).all()


def test_lift_is_as_small_as_it_needs_to_be():
    logits = torch.tensor([[[0.1, 0.0], [0.1, 0.0], [0.0, 9.0]], [[0.0, 0.1], [9.0, 0.0], [0.0, 0.1]]])
    voted = vote_logits(logits)
    lead = voted.max(dim=1).values - voted.min(dim=1).values
    assert (lead > 0).all()
    assert (lead < 0.01).all()


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, seed=SEEDS)
def test_lift_carries_no_gradient(shape, seed: int):
    logits = spread(shape, seed, dtype=torch.float64).requires_grad_()
    weights = noise(shape[0], shape[2], seed=seed + 1, dtype=torch.float64)
    (voted,) = torch.autograd.grad(vote_logits(logits), logits, weights)
    (soft,) = torch.autograd.grad(log_mean_probability(logits), logits, weights)
    assert torch.equal(voted, soft)


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, seed=SEEDS, label_seed=SEEDS)
def test_cross_entropy_of_unlifted_answers_has_the_gradient_of_the_log_mean_probability(
    shape, seed: int, label_seed: int
):
    """The latents agree on the top class, so nothing is lifted, and -log p needs no further softmax."""
    logits = spread(shape, seed, dtype=torch.float64)
    logits[:, :, 0] = logits.max(dim=2).values + 0.5
    logits.requires_grad_()
    labels = torch.randint(shape[2], (shape[0],), generator=torch.Generator().manual_seed(label_seed))
    (ours,) = torch.autograd.grad(F.cross_entropy(vote_logits(logits), labels, reduction="sum"), logits)
    chosen = log_mean_probability(logits).gather(1, labels[:, None])
    (expected,) = torch.autograd.grad(-chosen.sum(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gap", [10.0, 30.0, 60.0])
def test_cross_entropy_of_confident_unanimous_votes_has_a_gradient_in_float32(gap: float):
    """Every latent is sure of its class by ``gap``; one-hot votes would have no gradient at all."""
    labels = torch.tensor([2, 0])
    logits = 0.1 * noise(2, 4, 3, seed=1)
    logits = (logits + gap * F.one_hot(labels, 3)[:, None]).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(vote_logits(logits), labels, reduction="sum"), logits)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(2).abs().amax(dim=2) > 0).all()


# --------------------------------------------------------------------------------------------------------- margin


@settings(deadline=None, max_examples=50)
@given(logits=coarse_logits())
def test_margin_is_the_lead_of_the_first_class_in_shares_of_the_votes(logits: Tensor):
    votes = count_votes(logits)
    margin = vote_margin(votes)
    for value, row in zip(margin.tolist(), votes.tolist(), strict=True):
        first, second = sorted(row, reverse=True)[:2]
        assert value == pytest.approx((first - second) / logits.shape[1], abs=1e-6)
        assert 0 <= value <= 1


# ------------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("n_latents", [1, 3])
def test_one_class_is_always_the_answer(n_latents: int):
    logits = noise(2, n_latents, 1, seed=1).requires_grad_()
    assert majority_label(logits).tolist() == [0, 0]
    assert count_votes(logits).tolist() == [[n_latents], [n_latents]]
    assert vote_margin(count_votes(logits)).tolist() == [1.0, 1.0]
    values = vote_logits(logits)
    torch.testing.assert_close(values, torch.zeros(2, 1), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("n_latents", "classes"), [(1, 1), (3, 5)])
def test_no_images_give_no_answers(n_latents: int, classes: int):
    logits = torch.empty(0, n_latents, classes)
    assert vote_logits(logits).shape == (0, classes)
    assert vote_logits(logits, lift=False).shape == (0, classes)
    assert count_votes(logits).shape == (0, classes)
    assert majority_label(logits).shape == (0,)
    assert vote_margin(count_votes(logits)).shape == (0,)


def test_the_nearest_of_those_that_agree_with_the_vote_is_shown():
    """Version 0 is nearest but disagrees; of image 1 nobody agrees; image 2 has two that agree alike."""
    images = torch.zeros(3, 1, 2, 3)
    size = torch.tensor([[0.1, 0.5, 0.3], [0.3, 0.2, 0.4], [0.5, 0.2, 0.2]])
    versions = size[:, :, None, None, None].expand(3, 3, 1, 2, 3)
    logits = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1]])[:, :, None] == torch.arange(2)
    assert nearest_voter(images, versions, logits.float(), torch.tensor([1, 1, 1])).tolist() == [2, 1, 1]
