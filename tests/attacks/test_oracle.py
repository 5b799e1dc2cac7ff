"""An attack's way to the model: whose noise, how many evaluations, which gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attack_toys import SHAPE, THREATS, Linear, Noisy, labelled, linear, wrapped
from cmap_defense.attacks import PGD, CrossEntropy, Goal, Loss, Margin, ShortCMAP, ThreatModel, Transfer, VoteMargin
from cmap_defense.attacks.oracle import REEVALUATION, RESTART, Oracle, gradient_to, unit
from cmap_defense.errors import GradientError, GradientWarning, SettingsError
from cmap_defense.gradients import Detached, StraightThrough, Unrolled
from cmap_defense.rng import derived_seeds
from toys import noise

SEEDS = torch.tensor([5, -7, 2**62])
LOSSES = [CrossEntropy(), Margin(), VoteMargin()]


def scene(model: object = None, **options: bool) -> tuple[Oracle, Tensor, Goal]:
    images, labels = labelled(3, dtype=torch.float64)
    return Oracle(model or Noisy(), SEEDS, **options), images, Goal(labels)  # pyright: ignore


def taken(model: Noisy) -> list[list[int]]:
    return [seeds.tolist() for seeds in model.seen if seeds is not None]


# ------------------------------------------------------------------------------------------------------------ the noise


def test_evaluations_are_numbered_and_each_number_has_its_noise():
    model = Noisy()
    oracle, images, _ = scene(model)
    assert oracle.count == 0
    assert oracle.own_seeds().tolist() == derived_seeds(SEEDS, 0).tolist()  # pyright: ignore
    for evaluation in (1, 2, 3):
        oracle(images)
        assert oracle.count == evaluation
        assert taken(model)[-1] == derived_seeds(SEEDS, evaluation).tolist()
        assert oracle.own_seeds().tolist() == taken(model)[-1]  # pyright: ignore


def test_known_noise_is_the_seeds_themselves_for_search_restarts_and_judgement():
    model = Noisy()
    oracle, images, _ = scene(model, known=True)
    for one in (oracle, oracle.restarted(3), oracle.reevaluator(), oracle.of(model)):
        one(images)
    assert taken(model) == [SEEDS.tolist()] * 4


def test_restarts_and_the_judgement_stand_apart():
    model = Noisy()
    oracle, images, _ = scene(model)
    for one in (oracle, oracle.restarted(0), oracle.restarted(1), oracle.reevaluator()):
        one(images)
    expected = [derived_seeds(SEEDS, 1)]
    expected += [derived_seeds(derived_seeds(SEEDS, RESTART + r), 2 + r) for r in (0, 1)]
    expected += [derived_seeds(derived_seeds(SEEDS, REEVALUATION), 1)]
    assert taken(model) == [seeds.tolist() for seeds in expected]
    assert len({seed for seeds in taken(model) for seed in seeds}) == 12


def test_what_shares_a_count_and_what_has_its_own():
    ticks: list[int] = []
    oracle = Oracle(Noisy(), SEEDS, tick=lambda: ticks.append(1))
    images, _ = labelled(3)
    for one in (oracle, oracle.of(linear), oracle.restarted(1), oracle.reevaluator()):
        one(images)
    reevaluator = oracle.reevaluator()
    reevaluator(images)
    reevaluator(images)
    assert (oracle.count, reevaluator.count, len(ticks)) == (3, 2, 6)


def test_a_model_with_a_seed_of_its_own_is_asked_without_seeds():
    for model in (Noisy(seed=3), wrapped(seed=3)):
        oracle, images, _ = scene(model)
        assert oracle.next_noise() is None
        assert oracle.own_seeds() is None
        oracle(images)
        assert oracle.count == 2
    model = Noisy(seed=3)
    scene(model)[0](images)
    assert model.seen == [None]


def test_a_plain_model_is_asked_with_images_alone():
    oracle, images, _ = scene(linear)
    assert torch.equal(oracle(images), linear(images))
    assert oracle.next_noise() is None
    assert oracle.count == 2


@pytest.mark.parametrize("known", [False, True])
def test_again_is_the_noise_of_the_evaluation_before_and_one_more_evaluation(known: bool):
    ticks: list[int] = []
    model, (images, _) = Noisy(), labelled(3, dtype=torch.float64)
    oracle = Oracle(model, SEEDS, known=known, tick=lambda: ticks.append(1))
    first = oracle(images)
    again = oracle(images, again=True)
    assert torch.equal(first, again)
    assert oracle.count == len(ticks) == 2
    oracle(images)
    third = SEEDS if known else derived_seeds(SEEDS, 3)
    assert taken(model)[1:] == [taken(model)[0], third.tolist()]
    assert oracle.count == len(ticks) == 3


def test_again_changes_nothing_for_models_that_take_no_seeds():
    model = Noisy(seed=3)
    oracle, images, _ = scene(model)
    oracle(images)
    oracle(images, again=True)
    assert model.seen == [None, None]
    assert oracle.count == 2
    oracle, images, _ = scene(linear)
    oracle(images)
    assert torch.equal(oracle(images, again=True), linear(images))
    assert oracle.count == 2


def test_again_for_a_wrapper():
    oracle, images, _ = scene(wrapped())
    with torch.no_grad():
        first, again, other = oracle(images.float()), oracle(images.float(), again=True), oracle(images.float())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_part_of_the_batch_is_answered_without_the_seeds_of_the_others():
    model = Noisy()
    oracle, images, _ = scene(model)
    oracle(images[:2])
    assert model.seen == [None]
    part = Oracle(wrapped(), SEEDS)(images[:2].float())
    assert part.shape == (2, 4)


def test_a_wrapper_gets_the_seeds():
    oracle, images, _ = scene(wrapped())
    with torch.no_grad():
        expected = wrapped()(images.float(), seeds=derived_seeds(SEEDS, 1))
        assert torch.equal(oracle(images.float()), expected)


def test_wrapper_is_the_model_or_an_error_that_names_the_attack():
    model = wrapped()
    assert Oracle(model, SEEDS).wrapper(PGD(ThreatModel())) is model
    with pytest.raises(
        SettingsError,
        match=r"ShortCMAP with these settings needs the latents or .* PurifiedClassifier, but the model is Linear",
    ):
        Oracle(Linear(), SEEDS).wrapper(ShortCMAP(ThreatModel()))
    with pytest.raises(SettingsError, match="PGD with these settings needs"):
        PGD(ThreatModel(), gradient=Unrolled())(linear, *labelled())


# --------------------------------------------------------------------------------------------------------- the gradient


@settings(max_examples=15)
@given(samples=st.integers(1, 4), loss=st.sampled_from(LOSSES[:2]), known=st.booleans())
def test_eot_is_the_mean_of_single_gradients_under_the_same_seeds(samples: int, loss: Loss, known: bool):
    oracle, images, goal = scene(known=known)
    feedback = oracle.feedback(images, goal, loss, samples)
    model, values, gradients, reached = Noisy(), [], [], []
    for evaluation in range(1, samples + 1):
        leaf = images.clone().requires_grad_()
        logits = model(leaf, seeds=SEEDS if known else derived_seeds(SEEDS, evaluation))
        value = loss(logits[None], goal)
        gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
        values.append(value.detach())
        reached.append((logits.argmax(dim=1) != goal.labels).double())
    assert oracle.count == samples
    torch.testing.assert_close(feedback.gradient, torch.stack(gradients).mean(dim=0))
    torch.testing.assert_close(feedback.loss, torch.stack(values).mean(dim=0))
    torch.testing.assert_close(feedback.reached.double(), torch.stack(reached).mean(dim=0))
    if samples > 1 and not known:
        assert (gradients[0] - gradients[1]).abs().max() > 1e-3


@pytest.mark.parametrize("samples", [1, 3])
def test_balanced_gradients_have_one_length_before_they_are_averaged(samples: int):
    oracle, images, goal = scene(Noisy(3.0))
    feedback = oracle.feedback(images, goal, CrossEntropy(), samples, balanced=True)
    expected, lengths = torch.zeros_like(images), []
    for evaluation in range(1, samples + 1):
        single = Oracle(Noisy(3.0), derived_seeds(SEEDS, evaluation), known=True)
        gradient = single.feedback(images, goal, CrossEntropy(), 1).gradient
        lengths.append(gradient.flatten(1).norm(dim=1))
        expected += gradient / lengths[-1][:, None, None, None] / samples
    torch.testing.assert_close(feedback.gradient, expected)
    assert (feedback.gradient.flatten(1).norm(dim=1) <= 1 + 1e-9).all()
    plain = scene(Noisy(3.0))[0].feedback(images, goal, CrossEntropy(), samples)
    torch.testing.assert_close(plain.loss, feedback.loss)
    joint = [scene()[0].feedback(images, goal, VoteMargin(), samples, balanced=b).gradient for b in (False, True)]
    assert torch.equal(joint[0], joint[1])


@pytest.mark.parametrize("samples", [1, 3])
def test_a_joint_loss_sees_all_samples_at_once(samples: int):
    oracle, images, goal = scene()
    feedback = oracle.feedback(images, goal, VoteMargin(), samples)
    leaf, model = images.clone().requires_grad_(), Noisy()
    logits = torch.stack([model(leaf, seeds=derived_seeds(SEEDS, n)) for n in range(1, samples + 1)])
    value = VoteMargin()(logits, goal)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(feedback.gradient, gradient)
    torch.testing.assert_close(feedback.loss, value.detach())
    if samples > 1:
        apart = scene()[0].feedback(images, goal, Margin(), samples)
        assert (apart.gradient - gradient).abs().max() > 1e-3


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_feedback_agrees_with_finite_differences(loss: Loss):
    oracle, images, goal = scene(known=True)
    feedback = oracle.feedback(images, goal, loss, 3)
    direction, values = noise(3, *SHAPE, seed=4, dtype=torch.float64), []
    for sign in (1, -1):
        moved = oracle.feedback(images + sign * 1e-6 * direction, goal, loss, 3)
        values.append(moved.loss)
    slope = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close((feedback.gradient * direction).flatten(1).sum(dim=1), slope, rtol=1e-6, atol=1e-6)


def test_feedback_has_no_graph_and_leaves_the_images_alone():
    oracle, images, goal = scene()
    leaf = images.clone().requires_grad_()
    feedback = oracle.feedback(leaf, goal, Margin(), 2)
    assert leaf.grad is None
    for tensor in (feedback.loss, feedback.gradient, feedback.reached):
        assert not tensor.requires_grad
    assert feedback.loss.shape == feedback.reached.shape == (3,)
    assert feedback.gradient.shape == images.shape


def test_eot_narrows_the_gradient():
    """The spread of gradients falls with the root of the samples."""
    images, labels = labelled(3, dtype=torch.float64)
    spread = []
    for samples in (1, 16):
        gradients = [
            Oracle(Noisy(), derived_seeds(SEEDS, 1000 + n)).feedback(images, Goal(labels), CrossEntropy(), samples)
            for n in range(24)
        ]
        spread.append(torch.stack([one.gradient for one in gradients]).std(dim=0).mean().item())
    assert 2.5 < spread[0] / spread[1] < 6.5


@pytest.mark.parametrize(
    "model",
    [
        lambda x: linear(x).detach(),
        lambda x: linear(x.detach()),
        lambda x: torch.tensor([[0.0, 2.0]]).expand(len(x), 2),
    ],
)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_logits_without_a_graph_are_an_error(model: object, loss: Loss):
    with pytest.raises(GradientError, match="do not depend on the images"):
        PGD(ThreatModel(), loss=loss)(model, *labelled())  # pyright: ignore[reportArgumentType]


def test_logits_that_depend_on_weights_alone_are_the_same_error():
    """What a purifier under no_grad in front of an ordinary network looks like."""
    classifier = Linear()

    def model(images: Tensor) -> Tensor:
        with torch.no_grad():
            purified = images.clone()
        return classifier(purified)

    with pytest.raises(GradientError):
        PGD(ThreatModel())(model, *labelled())


def test_a_flat_model_shows_in_the_history():
    """A gradient of zeros is no error; a warning, an image that does not move and a norm of zero tell."""
    images, labels = labelled()
    with pytest.warns(GradientWarning, match="3 of 3 images was zero at every step"):
        result = PGD(ThreatModel(), steps=2, random_start=False)(lambda x: linear(x.round()), images, labels)
    assert torch.equal(result.history["gradient_norm"], torch.zeros(2, 3))
    assert torch.equal(result.images, images)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(ThreatModel()),
        PGD(ThreatModel(), gradient=Detached()),
        PGD(ThreatModel(), loss=VoteMargin(), eot=2),
        ShortCMAP(ThreatModel(), gradient=Detached()),
        Transfer(PGD(ThreatModel()), source=wrapped(gradient=Detached())),
    ],
)
def test_a_detached_wrapper_is_an_error_that_names_the_other_modes(attack: PGD):
    with pytest.raises(GradientError, match=r"StraightThrough\(\).*Unrolled\(\).*Implicit\(\).*Surrogate\(\)"):
        attack(wrapped(gradient=Detached()), *labelled())


def test_the_gradient_mode_of_the_attack_takes_the_place_of_the_models():
    images, labels = labelled()
    found = [
        PGD(THREATS["linf"], steps=1, random_start=False, gradient=mode)(wrapped(gradient=own), images, labels).images
        for own, mode in (
            (Detached(), Unrolled()),
            (StraightThrough(), Unrolled()),
            (Unrolled(), None),
            (Detached(), StraightThrough()),
        )
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[3]).abs().max() > 1e-3


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-40, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e37]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_unit_gradients_have_length_one_and_their_direction_whatever_their_size(
    seed: int, size: float, dtype: torch.dtype
):
    """Squares of 1e30 overflow in float32, those of 1e-30 vanish; images in one batch may be of all sizes."""
    plain = noise(3, *SHAPE, seed=seed, dtype=torch.float64)
    scale = torch.tensor([size, 1.0, 0.0], dtype=torch.float64)[:, None, None, None]
    found = unit((plain * scale).to(dtype))
    assert found.dtype == dtype
    expected = plain[:2] / plain[:2].square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    digits = 1e-4 if size == 1e-40 and dtype == torch.float32 else 1e-6  # a subnormal number has few of them
    torch.testing.assert_close(found[:2].double(), expected, rtol=digits, atol=digits / 100)
    assert torch.equal(found[2], torch.zeros(SHAPE, dtype=dtype))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_none_for_its_image_alone(broken: float):
    images, _ = labelled(3, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    factors = noise(3, *SHAPE, seed=4, dtype=torch.float64)
    spoilt = factors.clone()
    spoilt[1, 2, 3, 4] = broken
    found = gradient_to(leaf, (leaf * spoilt).sum())
    assert torch.equal(found[1], torch.zeros(SHAPE, dtype=torch.float64))
    assert torch.equal(found[[0, 2]], factors[[0, 2]])


@pytest.mark.parametrize("balanced", [False, True])
def test_an_image_without_a_finite_gradient_is_left_alone_and_the_others_are_as_without_it(balanced: bool):
    """The root of 0 has an infinite slope; the answer itself is a number."""

    def model(images: Tensor) -> Tensor:
        root = (images[1:2] - images[1:2].detach()).abs().sum(dim=(1, 2, 3)).sqrt()
        return linear(images).index_add(0, torch.tensor([1]), root[:, None].expand(1, 4))

    images, labels = labelled(3)
    attack = PGD(THREATS["linf"], steps=3, random_start=False, balanced=balanced, momentum=0.5)
    with pytest.warns(GradientWarning, match="1 of 3"):
        result = attack(model, images, labels)
    expected = attack(linear, images, labels)
    assert torch.equal(result.images[1], images[1])
    assert torch.equal(result.images[[0, 2]], expected.images[[0, 2]])
    assert torch.isfinite(torch.stack(list(result.history.values()))).all()


def test_gradient_to_needs_a_graph_that_reaches_the_images():
    leaf = torch.ones(1, *SHAPE, requires_grad=True)
    weight = torch.ones(1, requires_grad=True)
    for loss in (torch.zeros(()), weight.sum(), (leaf.detach() * weight).sum()):
        with pytest.raises(GradientError, match="do not depend on the images"):
            gradient_to(leaf, loss)


# -------------------------------------------------------------------------------------------------- the averaged answer


@settings(max_examples=10)
@given(samples=st.integers(1, 4))
def test_averaged_is_the_log_of_the_mean_probability(samples: int):
    oracle, images, _ = scene()
    answer = oracle.averaged(samples)(images)
    model = Noisy()
    chances = [model(images, seeds=derived_seeds(SEEDS, n)).softmax(dim=1) for n in range(1, samples + 1)]
    torch.testing.assert_close(answer.exp(), torch.stack(chances).mean(dim=0))
    assert oracle.count == samples


def test_averaged_is_differentiable():
    oracle, images, goal = scene(known=True)
    leaf = images.clone().requires_grad_()
    vote = oracle.averaged(3)(leaf)
    (gradient,) = torch.autograd.grad(Margin()(vote[None], goal).sum(), leaf)
    torch.testing.assert_close(gradient, oracle.feedback(images, goal, VoteMargin(), 3).gradient)


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return linear(images)


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_each_sample_is_one_call_of_the_model(samples: int, loss: Loss):
    model = Counting()
    oracle, images, goal = scene(model)
    oracle.feedback(images, goal, loss, samples)
    assert model.calls == oracle.count == samples
