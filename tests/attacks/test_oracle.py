"""The model as an attack sees it: noise, number of evaluations, gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import DOUBLE, SHAPE, THREATS, Linear, Noisy, labelled, linear, wrapped
from cmap_defense.attacks import (
    APGD,
    PGD,
    Attack,
    CrossEntropy,
    Goal,
    Loss,
    Margin,
    ShortCMAP,
    Square,
    ThreatModel,
    Transfer,
    VoteMargin,
)
from cmap_defense.attacks.oracle import REEVALUATION, RESTART, Oracle, gradient_to, unit
from cmap_defense.common.rng import derived_seeds
from cmap_defense.errors import GradientError, GradientWarning, SettingsError
from cmap_defense.gradients import Detached, StraightThrough, Unrolled
from toys import noise

SEEDS = torch.tensor([5, -7, 2**62])
LOSSES = [CrossEntropy(), Margin(), VoteMargin()]


def scene(model: Any = None, **options: Any) -> tuple[Oracle, Tensor, Goal]:
    images, labels = labelled(3, dtype=DOUBLE)
    return Oracle(model or Noisy(), SEEDS, **options), images, Goal(labels)


def taken(model: Noisy) -> list[list[int]]:
    return [seeds.tolist() for seeds in model.seen if seeds is not None]


def test_evaluations_are_numbered_and_each_number_has_its_noise():
    model = Noisy()
    oracle, images, _ = scene(model)
    assert oracle.count == 0
    assert torch.equal(oracle.starting_noise(), derived_seeds(SEEDS, 0))
    for evaluation in (1, 2, 3):
        oracle(images)
        assert oracle.count == evaluation
        assert taken(model)[-1] == derived_seeds(SEEDS, evaluation).tolist()
        assert oracle.starting_noise().tolist() == taken(model)[-1]


@pytest.mark.parametrize("known", [False, True])
def test_restarts_and_the_reevaluation_have_noise_of_their_own_unless_it_is_known(known: bool):
    model = Noisy()
    oracle, images, _ = scene(model, known=known)
    for one in (oracle, oracle.restarted(0), oracle.restarted(1), oracle.reevaluator(), oracle.of(model)):
        one(images)
    expected = [derived_seeds(SEEDS, 1)]
    expected += [derived_seeds(derived_seeds(SEEDS, RESTART + r), 2 + r) for r in (0, 1)]
    expected += [derived_seeds(derived_seeds(SEEDS, REEVALUATION), 1), derived_seeds(SEEDS, 4)]
    assert taken(model) == ([SEEDS.tolist()] * 5 if known else [seeds.tolist() for seeds in expected])
    assert len({seed for seeds in taken(model) for seed in seeds}) == (3 if known else 15)


@pytest.mark.parametrize("known", [False, True])
def test_again_is_the_noise_of_the_evaluation_before_and_one_more_evaluation(known: bool):
    model = Noisy()
    oracle, images, _ = scene(model, known=known)
    assert torch.equal(oracle(images), oracle(images, again=True))
    assert oracle.count == 2
    oracle(images)
    third = SEEDS if known else derived_seeds(SEEDS, 3)
    assert taken(model)[1:] == [taken(model)[0], third.tolist()]
    assert oracle.count == 3


def test_wrapper_is_the_model_or_an_error_that_names_the_attack():
    model = wrapped()
    assert Oracle(model, SEEDS).wrapper(PGD(ThreatModel())) is model
    needs = r"with these settings needs the latents or .* PurifiedClassifier, but the model is"
    with pytest.raises(SettingsError, match=f"ShortCMAP {needs} Linear"):
        Oracle(Linear(), SEEDS).wrapper(ShortCMAP(ThreatModel()))
    with pytest.raises(SettingsError, match=f"PGD {needs} function"):
        PGD(ThreatModel(), gradient=Unrolled())(linear, *labelled())


@settings(max_examples=20)
@given(samples=st.integers(1, 4), loss=st.sampled_from(LOSSES), known=st.booleans())
def test_eot_is_the_gradient_of_the_loss_over_evaluations_with_these_seeds(samples: int, loss: Loss, known: bool):
    """The mean over single evaluations, or for a joint loss that of all of them; one call of the model each."""
    model, other = Noisy(), Noisy()
    oracle, images, goal = scene(model, known=known)
    caller = images.clone().requires_grad_()
    feedback = oracle.feedback(caller, goal, loss, samples)
    leaf = images.clone().requires_grad_()
    logits = torch.stack(
        [other(leaf, seeds=SEEDS if known else derived_seeds(SEEDS, n)) for n in range(1, samples + 1)]
    )
    value = loss(logits, goal) if loss.joint else torch.stack([loss(one[None], goal) for one in logits]).mean(dim=0)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert oracle.count == len(model.seen) == samples
    torch.testing.assert_close(feedback.gradient, gradient)
    torch.testing.assert_close(feedback.loss, value.detach())
    reached = (logits.argmax(dim=2) != goal.labels).double().mean(dim=0)
    torch.testing.assert_close(feedback.reached.double(), reached)
    assert caller.grad is None
    for tensor in (feedback.loss, feedback.gradient, feedback.reached):
        assert not tensor.requires_grad
    assert feedback.loss.shape == feedback.reached.shape == (3,)
    if samples > 1 and not known:
        once = Oracle(Noisy(), SEEDS).feedback(images, goal, loss, 1)
        assert (once.gradient - feedback.gradient).abs().max() > 1e-3
        means = scene()[0].feedback(images, goal, Margin(), samples)
        assert not loss.joint or (means.gradient - feedback.gradient).abs().max() > 1e-3


@pytest.mark.parametrize("samples", [1, 3])
def test_balanced_gradients_have_one_length_before_they_are_averaged(samples: int):
    oracle, images, goal = scene(Noisy(3.0))
    feedback = oracle.feedback(images, goal, CrossEntropy(), samples, balanced=True)
    expected = torch.zeros_like(images)
    for evaluation in range(1, samples + 1):
        single = Oracle(Noisy(3.0), derived_seeds(SEEDS, evaluation), known=True)
        gradient = single.feedback(images, goal, CrossEntropy(), 1).gradient
        expected += gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None] / samples
    torch.testing.assert_close(feedback.gradient, expected)
    assert (feedback.gradient.flatten(1).norm(dim=1) <= 1 + 1e-9).all()
    plain = scene(Noisy(3.0))[0].feedback(images, goal, CrossEntropy(), samples)
    torch.testing.assert_close(plain.loss, feedback.loss)
    joint = [scene()[0].feedback(images, goal, VoteMargin(), samples, balanced=b).gradient for b in (False, True)]
    assert torch.equal(joint[0], joint[1])


def test_a_gradient_of_zeros_is_a_warning_and_no_step():
    images, labels = labelled()
    with pytest.warns(GradientWarning, match="3 of 3 images was zero at every step"):
        result = PGD(ThreatModel(), steps=2, random_start=False)(lambda x: linear(x.round()), images, labels)
    assert torch.equal(result.history["gradient_norm"], torch.zeros(2, 3))
    assert torch.equal(result.images, images)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(ThreatModel(), gradient=Detached()),
        PGD(ThreatModel(), loss=VoteMargin(), eot=2),
        ShortCMAP(ThreatModel(), gradient=Detached()),
        Transfer(PGD(ThreatModel()), source=wrapped(gradient=Detached())),
    ],
)
def test_a_detached_wrapper_is_an_error_that_names_the_other_modes(attack: PGD):
    with pytest.raises(GradientError, match=r"Unrolled\(\).*StraightThrough\(\).*Implicit\(\).*Surrogate\(\)"):
        attack(wrapped(gradient=Detached()), *labelled())


def test_the_gradient_mode_of_the_attack_takes_the_place_of_the_models():
    modes = [
        (Detached(), Unrolled()),
        (StraightThrough(), Unrolled()),
        (Unrolled(), None),
        (Detached(), StraightThrough()),
    ]
    found = [
        PGD(THREATS["linf"], steps=1, random_start=False, gradient=mode)(wrapped(gradient=own), *labelled()).images
        for own, mode in modes
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[3]).abs().max() > 1e-3


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-40, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e37]),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_unit_gradients_have_length_one_whatever_their_size(seed: int, size: float, dtype: torch.dtype):
    """Squares of 1e30 overflow in float32, those of 1e-30 vanish; images in one batch may be of all sizes."""
    plain = noise(3, *SHAPE, seed=seed, dtype=DOUBLE)
    scale = torch.tensor([size, 1.0, 0.0], dtype=DOUBLE)[:, None, None, None]
    found = unit((plain * scale).to(dtype))
    assert found.dtype == dtype
    expected = plain[:2] / plain[:2].square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    digits = 1e-4 if size == 1e-40 and dtype == torch.float32 else 1e-6  # a subnormal number has few of them
    torch.testing.assert_close(found[:2].double(), expected, rtol=digits, atol=digits / 100)
    assert torch.equal(found[2], torch.zeros(SHAPE, dtype=dtype))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_zero_for_its_image_alone(broken: float):
    leaf = labelled(3, dtype=DOUBLE)[0].requires_grad_()
    factors = noise(3, *SHAPE, seed=4, dtype=DOUBLE)
    spoilt = factors.clone()
    spoilt[1, 2, 3, 4] = broken
    found = gradient_to(leaf, (leaf * spoilt).sum())
    assert torch.equal(found[1], torch.zeros(SHAPE, dtype=DOUBLE))
    assert torch.equal(found[[0, 2]], factors[[0, 2]])


class SometimesBroken(Noisy):
    """The gradient of the image at position 1 is NaN in every other evaluation."""

    calls = 0

    def __call__(self, images: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.calls % 2 == 0:
            broken = images[1:2] + (images[1:2] - images[1:2]).sqrt()
            images = torch.cat([images[:1], broken, images[2:]])
        return super().__call__(images, seeds=seeds)


@pytest.mark.parametrize("attack", [PGD(ThreatModel(), steps=2, eot=2), APGD(ThreatModel(), steps=3)])
def test_gradients_that_are_not_finite_are_counted_and_told(attack: Attack):
    with pytest.warns(
        GradientWarning, match=r"16\.7% of the gradients were NaN or infinite and counted as zero, of 1 im"
    ):
        result = attack(SometimesBroken(), *labelled())
    assert result.nonfinite is not None
    assert result.nonfinite.tolist() == [0.0, 0.5, 0.0]
    assert torch.isfinite(result.images).all()


def test_a_search_without_gradients_has_none_that_are_not_finite():
    assert Square(ThreatModel(), queries=2)(linear, *labelled()).nonfinite is None
    sound = PGD(ThreatModel(), steps=1)(linear, *labelled()).nonfinite
    assert sound is not None
    assert not sound.any()


@pytest.mark.parametrize("samples", [1, 3])
def test_averaged_is_the_log_of_the_mean_probability_and_differentiable(samples: int):
    oracle, images, goal = scene()
    leaf, model = images.clone().requires_grad_(), Noisy()
    logits = oracle.averaged(samples)(leaf)
    chances = [model(images, seeds=derived_seeds(SEEDS, n)).softmax(dim=1) for n in range(1, samples + 1)]
    torch.testing.assert_close(logits.detach().exp(), torch.stack(chances).mean(dim=0))
    assert oracle.count == samples
    (gradient,) = torch.autograd.grad(Margin()(logits[None], goal).sum(), leaf)
    torch.testing.assert_close(gradient, scene()[0].feedback(images, goal, VoteMargin(), samples).gradient)
