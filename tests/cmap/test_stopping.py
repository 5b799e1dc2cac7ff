"""Early stop of each image: when, what it leaves, independence of the batch, gradients, and what it costs."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmap_defense import CMAP, CMAPSettings, PurificationResult, PurifiedClassifier
from cmap_defense.cmap.optimise import LatentState, optimise_latents
from cmap_defense.common.passes import counting_passes
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import Implicit, StraightThrough, Unrolled
from cmap_defense.purifiers import Chain
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
B, K, N = 4, 3, 24
DOUBLE = torch.float64
BACKBONE = ToyBackbone(SHAPE).double().requires_grad_(False)
CONTRAST = torch.tensor([1.0, 0.1, 0.5, 0.02], dtype=DOUBLE)[:, None, None, None]
IMAGES = 0.5 + CONTRAST * (uniform(B, *SHAPE, seed=5, dtype=DOUBLE) - 0.5)
WEIGHTS = noise(B, K, *SHAPE, seed=9, dtype=DOUBLE)
DIRECTION = noise(B, *SHAPE, seed=11, dtype=DOUBLE)
SEEDS = [3, 1, 4, 2]
FULL = CMAPSettings(n_latents=K, iterations=N, learning_rate=0.05, l1_smoothing=0.05)
DECREASE = FULL.replace(stop_decrease=0.2, stop_window=4)
AGREEMENT = FULL.replace(stop_agreement=3)
BOTH = DECREASE.replace(stop_agreement=5)
STOPS = pytest.mark.parametrize("chosen", [DECREASE, AGREEMENT, BOTH], ids=["decrease", "agreement", "both"])
MATRIX = noise(math.prod(SHAPE), 3, seed=2, dtype=DOUBLE)


def classify(images: Tensor) -> Tensor:
    return images.flatten(1) @ MATRIX.to(images.dtype)


def wrapped(chosen: CMAPSettings, **options: Any) -> PurifiedClassifier:
    return PurifiedClassifier(classify, BACKBONE, settings=chosen, **options)


def purified(chosen: CMAPSettings, rows: slice = slice(None), **options: Any) -> PurificationResult:
    return wrapped(chosen, **options).purify(IMAGES[rows], seeds=SEEDS[rows])


def iterations_of(result: PurificationResult) -> Tensor:
    assert result.iterations is not None
    return result.iterations


@STOPS
def test_images_stop_at_their_own_time_with_the_state_that_they_had_then(chosen: CMAPSettings) -> None:
    result, seen = purified(chosen), {}
    made = iterations_of(result)
    assert len(made.unique()) > 1
    assert made.min() < N
    assert made.dtype == torch.int64
    for n in made.unique().tolist():
        seen[n] = purified(FULL.replace(iterations=n))
    assert result.history is not None
    for b, n in enumerate(made.tolist()):
        torch.testing.assert_close(result.latents[b], seen[n].latents[b], rtol=1e-9, atol=1e-9)
        total = result.history.total[:, b]
        torch.testing.assert_close(total[:n], seen[n].history.total[:, b], rtol=1e-9, atol=1e-9)
        assert total[n:].isnan().all()
    assert result.history.total.shape == (N, B)


def test_the_decrease_is_that_of_the_distance_from_the_lowest_value() -> None:
    whole, made = purified(FULL).history, iterations_of(purified(DECREASE))
    assert whole is not None
    excess = whole.total + FULL.ssim_weight * math.prod(SHAPE)
    assert (excess > 0).all()
    window, share = DECREASE.stop_window, DECREASE.stop_decrease or 0
    for b in range(B):
        small = [n for n in range(window, N) if excess[n - window, b] - excess[n, b] < share * excess[n - window, b]]
        assert made[b] == min([n + 1 for n in small] + [N])


def test_labels_agree_at_two_checks_one_after_the_other() -> None:
    labels: dict[int, Tensor] = {}
    model = wrapped(FULL)

    def watch(state: LatentState) -> None:
        shown = (state.generated.flatten(0, 1) + 1) / 2
        labels[state.iteration] = classify(shown).argmax(dim=1).view(state.latents.shape[:2])

    with model.register_step_hook(watch):
        model.purify(IMAGES, seeds=SEEDS)
    every = AGREEMENT.stop_agreement
    assert every is not None
    for b, n in enumerate(iterations_of(purified(AGREEMENT)).tolist()):
        agreed = [set(labels[m][b].tolist()) for m in range(0, N, every)]
        pairs = itertools.pairwise(agreed)
        first = next((i for i, (one, two) in enumerate(pairs, start=1) if len(one) == 1 and one == two), None)
        assert n == (N if first is None else first * every + 1)


@STOPS
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_the_result_does_not_depend_on_batch_or_chunks(chosen: CMAPSettings, chunk: int | None) -> None:
    whole = purified(chosen)
    for rows in (slice(0, B), slice(1, 3), slice(3, 4)):
        part = purified(chosen, rows, max_parallel=chunk)
        torch.testing.assert_close(part.images, whole.images[rows], rtol=1e-9, atol=1e-9)
        assert torch.equal(iterations_of(part), iterations_of(whole)[rows])
        assert torch.equal(part.passes, whole.passes[rows])  # pyright: ignore[reportArgumentType, reportOptionalSubscript]


@STOPS
def test_cost_follows_the_images_that_go_on(chosen: CMAPSettings) -> None:
    with counting_passes() as counter:
        result = purified(chosen)
    assert result.passes is not None
    assert torch.equal(result.passes, K * (iterations_of(result) + 1))
    assert counter.total == result.passes.sum() < CMAP(chosen).passes * B
    assert purified(FULL).passes is None
    assert iterations_of(purified(FULL)).tolist() == [N] * B


@STOPS
@pytest.mark.parametrize("options", [{}, {"checkpoint": False}, {"max_growth": 1e9}])
def test_the_unrolled_gradient_goes_through_the_iterations_that_were_made(chosen: CMAPSettings, options: Any) -> None:
    model = wrapped(chosen, gradient=Unrolled(**options), max_parallel=5)
    leaf, h = IMAGES.clone().requires_grad_(), 1e-6
    result = model.purify(leaf, seeds=SEEDS)
    assert torch.equal(iterations_of(result), iterations_of(purified(chosen)))
    with counting_passes() as back:
        (gradient,) = torch.autograd.grad((result.images * WEIGHTS).sum(), leaf)
    again = 1 if options.get("checkpoint", True) else 0
    assert back.total == K * ((1 + again) * iterations_of(result) + 1).sum()
    values = []
    for sign in (1, -1):
        found = model.purify(IMAGES + sign * h * DIRECTION, seeds=SEEDS)
        assert torch.equal(iterations_of(found), iterations_of(result))
        values.append((found.images * WEIGHTS).flatten(1).sum(dim=1))
    slopes = (gradient * DIRECTION).flatten(1).sum(dim=1)  # image by image, as they do not depend on each other
    torch.testing.assert_close(slopes, (values[0] - values[1]) / (2 * h), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_last_steps_are_those_of_each_image(checkpoint: bool) -> None:
    mode = Unrolled(last=3, checkpoint=checkpoint)
    leaf = IMAGES.clone().requires_grad_()
    result = wrapped(DECREASE, gradient=mode).purify(leaf, seeds=SEEDS)
    (gradient,) = torch.autograd.grad((result.images * WEIGHTS).sum(), leaf)
    for b, n in enumerate(iterations_of(result).tolist()):
        alone = IMAGES[b : b + 1].clone().requires_grad_()
        found = wrapped(FULL.replace(iterations=n), gradient=mode).purify(alone, seeds=SEEDS[b : b + 1])
        (expected,) = torch.autograd.grad((found.images * WEIGHTS[b]).sum(), alone)
        torch.testing.assert_close(gradient[b : b + 1], expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mode", [StraightThrough(), Implicit(damping=30.0)], ids=repr)
def test_other_gradient_modes_follow_the_same_rule(mode: Any) -> None:
    leaf = IMAGES.clone().requires_grad_()
    result = wrapped(BOTH, gradient=mode).purify(leaf, seeds=SEEDS)
    plain = purified(BOTH)
    assert torch.equal(iterations_of(result), iterations_of(plain))
    torch.testing.assert_close(result.images.detach(), plain.images)
    (gradient,) = torch.autograd.grad((result.images * WEIGHTS).sum(), leaf)
    assert (gradient.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("live", [False, True])
def test_hooks_see_the_images_that_go_on_and_may_replace_their_latents(live: bool) -> None:
    seen: dict[int, list[int]] = {}

    def hook(state: LatentState) -> Tensor:
        seen[state.iteration] = state.image_indices.tolist()
        torch.testing.assert_close(state.images, IMAGES[state.image_indices], rtol=0, atol=1e-4)
        assert len(state.latents) == len(state.generated) == len(state.terms.total) == len(state.image_indices)
        return 0.999 * state.latents

    model = wrapped(DECREASE, gradient=Unrolled())
    leaf = IMAGES.clone().requires_grad_()
    with model.register_step_hook(hook, live=live):
        result = model.purify(leaf, seeds=SEEDS)
        made = iterations_of(result)
        assert len(made.unique()) > 1
        assert seen == {n: (made > n).nonzero().flatten().tolist() for n in range(int(made.max()))}
        (gradient,) = torch.autograd.grad((result.images * WEIGHTS).sum(), leaf)
        assert (gradient.flatten(1).abs().sum(dim=1) > 0).all()
        if live:  # a replacement of a hook that is not live cuts the derivative
            values = []
            with torch.no_grad():
                for sign in (1, -1):
                    moved = model.purify(IMAGES + sign * 1e-6 * DIRECTION, seeds=SEEDS)
                    assert torch.equal(iterations_of(moved), made)
                    values.append((moved.images * WEIGHTS).sum().item())
            slope = (gradient * DIRECTION).sum().item()
            assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_a_chain_hands_the_classifier_on() -> None:
    made = iterations_of(purified(AGREEMENT))
    chain = PurifiedClassifier(classify, BACKBONE, purifier=Chain(CMAP(AGREEMENT))).purify(IMAGES, seeds=SEEDS)
    assert torch.equal(iterations_of(chain), made)
    assert torch.equal(chain.passes, K * (made + 1))  # pyright: ignore[reportArgumentType]


def test_without_a_classifier_labels_cannot_agree() -> None:
    with pytest.raises(SettingsError, match=r"stop_agreement compares labels: give the purifier predict=\.\.\."):
        CMAP(AGREEMENT)(BACKBONE, IMAGES, seeds=torch.tensor(SEEDS))


def test_images_are_classified_in_the_size_of_the_input() -> None:
    sizes = set()

    def noting(images: Tensor) -> Tensor:
        sizes.add(tuple(images.shape[1:]))
        return images.flatten(1)[:, :3]

    model = PurifiedClassifier(noting, BACKBONE, settings=AGREEMENT, resize="bilinear")
    model.purify(uniform(2, 3, 16, 10, seed=4, dtype=DOUBLE), seeds=[0, 1])
    assert sizes == {(3, 16, 10)}


def test_no_images_and_no_iterations() -> None:
    empty = purified(BOTH, slice(0, 0))
    assert iterations_of(empty).shape == (0,)
    restoring = type("Restoring", (ToyBackbone,), {"denoise": lambda self, noisy, sigma: self.generate(noisy)})
    model = PurifiedClassifier(classify, restoring(SHAPE), settings=BOTH.replace(level=0.5, iterations=0))
    assert iterations_of(model.purify(IMAGES.float(), seeds=SEEDS)).tolist() == [0] * B


@settings(deadline=None, max_examples=8)
@given(share=st.floats(1e-4, 0.9), window=st.integers(1, 12), cosine=st.booleans())
def test_no_image_stops_before_the_window_and_larger_shares_stop_sooner(
    share: float, window: int, cosine: bool
) -> None:
    chosen = FULL.replace(
        iterations=15, stop_decrease=share, stop_window=window, schedule="cosine" if cosine else "constant"
    )
    start = noise(B, K, *SHAPE, seed=3, dtype=DOUBLE)
    made = []
    for given_settings in (chosen, chosen.replace(stop_decrease=min(0.99, 2 * share))):
        _, history = optimise_latents(BACKBONE.generate, IMAGES, start, given_settings)
        made.append((~history.total.isnan()).sum(dim=0))
    assert (made[0] > window).all()
    assert (made[1] <= made[0]).all()
