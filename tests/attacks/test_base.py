"""What holds for every attack: a legal image, a re-evaluation that can be repeated by hand, and refused arguments."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import (
    CLASSES,
    EVERY,
    NAMES,
    NORMS,
    SHAPE,
    THREATS,
    Fixed,
    Noisy,
    attempts_of,
    base_seeds,
    labelled,
    linear,
    reevaluation_seeds,
    suite,
    wrapped,
)
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import (
    PGD,
    SPSA,
    Attack,
    AttackResult,
    Candidates,
    CrossEntropy,
    Goal,
    LatentAttack,
    Loss,
    Oracle,
    TargetSteer,
    ThreatModel,
    Transfer,
)
from cmap_defense.attacks.goal import margin
from cmap_defense.errors import AttackError, CmapError, InputTypeError, InputValueError, SettingsError
from toys import noise, uniform

INDICES = range(3)


@functools.cache
def outcome(name: str, norm: str, **options: Any) -> AttackResult:
    """An attack on three images behind CMAP, made once, re-evaluated twice."""
    return suite(THREATS[norm], seed=5, **options)[name](wrapped(), *labelled(), reevaluations=2)


def predictions(images: Tensor, seeds: Tensor) -> Tensor:
    """The wrapper's predictions under given noise."""
    with torch.no_grad():
        return wrapped()(images, seeds=seeds).argmax(dim=1)


@EVERY
@NORMS
def test_images_are_legal_and_reevaluated_with_the_noise_that_is_documented(name: str, norm: str):
    """Projecting them again changes nothing. The noise of the choice comes first, then that of the re-evaluations."""
    result, (clean, labels), threat = outcome(name, norm), labelled(), THREATS[norm]
    for images in (result.images, *result.candidates.unbind(dim=1)):
        assert images.min() >= 0
        assert images.max() <= 1
        assert (threat.distance(images, clean) <= threat.eps * (1 + 1e-6)).all()
        torch.testing.assert_close(threat.project(images, clean), images, rtol=0, atol=2e-7)
        assert not images.requires_grad
    assert torch.equal(result.distance, threat.distance(result.images, clean))
    assert (result.distance > 0).all()
    for row, found in enumerate(result.predictions, start=1):
        expected = predictions(result.images, reevaluation_seeds(INDICES, 5, attempts_of(result) + row))
        assert torch.equal(expected, found)
    for place, images in enumerate(result.candidates.unbind(dim=1)):
        expected = predictions(images, reevaluation_seeds(INDICES, 5, place + 1))
        assert torch.equal(expected, result.candidate_predictions[:, place])
    assert torch.equal(result.success, result.predictions[0] != labels)


@EVERY
def test_known_noise_is_that_of_every_prediction(name: str):
    result, (_, labels) = outcome(name, "linf", noise="known"), labelled()
    expected = predictions(result.images, base_seeds(INDICES, 5))
    assert torch.equal(result.predictions, expected.expand(2, -1))
    assert torch.equal(result.success, expected != labels)
    for place, images in enumerate(result.candidates.unbind(dim=1)):
        assert torch.equal(predictions(images, base_seeds(INDICES, 5)), result.candidate_predictions[:, place])


@EVERY
def test_shapes_and_restarts(name: str):
    result, more, (clean, labels) = outcome(name, "linf"), outcome(name, "linf", restarts=2), labelled()
    count = result.candidates.shape[1]
    assert result.images.shape == clean.shape
    assert result.success.shape == result.distance.shape == result.chosen.shape == (3,)
    assert (result.success.dtype, result.predictions.dtype, result.chosen.dtype) == (
        torch.bool,
        torch.int64,
        torch.int64,
    )
    assert result.predictions.shape == (2, 3)
    assert result.candidates.shape == (3, count, *SHAPE)
    assert result.candidate_predictions.shape == (3, count)
    assert torch.equal(result.images, result.candidates[torch.arange(3), result.chosen])
    assert torch.equal(result.labels, labels)
    assert result.targets is None
    attack: Any = suite(THREATS["linf"])[name]
    steps = attack.attack.steps if isinstance(attack, Transfer) else attack.steps
    assert result.history
    for column, values in result.history.items():
        assert values.shape == (steps, 3)
        assert torch.isfinite(values).all()
        assert len(more.history[column]) == 2 * steps
    assert more.candidates.shape[1] == 2 * count
    torch.testing.assert_close(more.candidates[:, :count], result.candidates, rtol=0, atol=1e-6)
    different = (more.candidates[:, count:] - more.candidates[:, :count]).abs().flatten(1).amax(dim=1)
    assert (different > 1e-3).all()


@EVERY
@pytest.mark.parametrize(("seed", "known"), [(None, "fresh"), (None, "known"), (1, "fresh")])
def test_an_empty_batch_gives_an_empty_result(name: str, seed: int | None, known: str):
    images, labels = labelled()
    result = suite(THREATS["l2"], noise=known)[name](wrapped(seed=seed), images[:0], labels[:0], reevaluations=2)
    assert result.images.shape == (0, *SHAPE)
    assert result.predictions.shape == (2, 0)
    for values in (result.success, result.any_success, result.vote_success, result.any_candidate_success):
        assert values.shape == (0,)
        assert values.dtype == torch.bool
    assert result.mean_success.shape == result.distance.shape == result.chosen.shape == (0,)


@NORMS
def test_restarts_with_known_noise_start_elsewhere(norm: str):
    result = PGD(THREATS[norm], steps=1, noise="known", restarts=2)(wrapped(), *labelled())
    assert (result.candidates[:, 0] - result.candidates[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"noise": "known"}, {}], ids=["known noise", "a model of one seed"])
@pytest.mark.parametrize("name", ["LatentAttack", "LatentAttack from noise", "ConsistencyDisruption", "Overpowered"])
def test_restarts_of_attacks_on_latents_begin_elsewhere_where_the_noise_is_always_the_same(name: str, options: dict):
    """The first run begins from what the defence has."""
    model = wrapped(seed=None if options else 3)
    once = suite(THREATS["linf"], **options)[name](model, *labelled())
    twice = suite(THREATS["linf"], restarts=2, **options)[name](model, *labelled())
    first, second = twice.candidates.chunk(2, dim=1)
    assert torch.equal(first, once.candidates)
    assert (first - second).abs().max() > 1e-4


def test_the_target_of_a_steering_attack_moves_to_another_threat_model_with_it():
    small, large = ThreatModel(eps=0.02), ThreatModel(eps=0.08)
    attack = TargetSteer(small, target=LatentAttack(small, steps=3), step_size=0.01).under(large)
    assert attack == TargetSteer(large, target=LatentAttack(large, steps=3), step_size=0.04)
    assert TargetSteer(small).under(large) == TargetSteer(large)


@EVERY
def test_a_targeted_attack_aims_at_its_target_and_nothing_else(name: str):
    images, labels = labelled()
    aims = [(labels + shift) % CLASSES for shift in (1, 2)]
    attack = suite(THREATS["linf"], seed=5)[name]
    if name == "ConsistencyDisruption released":
        with pytest.raises(SettingsError, match=r"released=True.* takes no targets"):
            attack(wrapped(), images, labels, targets=aims[0])
        return
    results = [attack(wrapped(), images, labels, targets=targets, reevaluations=2) for targets in aims]
    for result, targets in zip(results, aims, strict=True):
        assert torch.equal(result.targets, targets)
        assert torch.equal(result.success, result.predictions[0] == targets)
        hits = result.candidate_predictions == targets[:, None]
        assert torch.equal(result.any_candidate_success, hits.any(dim=1))
    assert (results[0].candidates - results[1].candidates).abs().max() > 1e-3


def test_an_attack_that_leaves_its_ball_is_projected_before_it_is_reevaluated():
    images, labels = labelled()
    result = Fixed(ThreatModel(eps=0.0), 1 - images[:, None])(linear, images, labels)
    assert torch.equal(result.images, images)
    assert not result.success.any()


@pytest.mark.parametrize(
    ("attack", "own", "others"),
    [
        (PGD(ThreatModel(), steps=3, eot=2), 3 * 2 + 1, 0),
        (PGD(ThreatModel(), steps=3, eot=2, restarts=2), 2 * 3 * 2 + 2 + 1, 0),
        (PGD(ThreatModel(), steps=2, keep="best"), 2 + 2 + 1, 0),
        (SPSA(ThreatModel(), steps=3, pairs=4), 3 * 4 * 2 + 1, 0),
        (Transfer(PGD(ThreatModel(), steps=3, eot=2)), 1, 6),
    ],
)
@pytest.mark.parametrize("reevaluations", [1, 3])
def test_queries_are_the_evaluations_of_the_model(attack: Any, own: int, others: int, reevaluations: int):
    model, source = Noisy(), Noisy()
    if isinstance(attack, Transfer):
        attack = Transfer(attack.attack, source=source)
    result = attack(model, *labelled(), reevaluations=reevaluations)
    assert (len(model.seen), len(source.seen)) == (own + reevaluations - 1, others)
    assert result.queries == len(model.seen) + len(source.seen)


@pytest.mark.parametrize(("known", "distinct"), [("fresh", 3 * 2 + 3), ("known", 1)])
def test_every_evaluation_has_noise_of_its_own_unless_it_is_known(known: str, distinct: int):
    model = Noisy()
    PGD(ThreatModel(), steps=3, eot=2, noise=known)(model, *labelled(), reevaluations=3)
    assert len(model.seen) == 3 * 2 + 3
    for image in INDICES:
        assert len({seeds[image].item() for seeds in model.seen if seeds is not None}) == distinct
    assert len({seed for seeds in model.seen if seeds is not None for seed in seeds.tolist()}) == 3 * distinct


def draws_globally(images: Tensor) -> Tensor:
    """A random model that takes no seeds."""
    return linear(images + torch.randn_like(images) * images)


@pytest.mark.parametrize("model", [Noisy(), draws_globally], ids=["seeded", "not seeded"])
def test_known_noise_is_the_same_in_search_and_reevaluation_and_fresh_noise_is_not(model: Any):
    """Steps of size 0: the search and the re-evaluation have one and the same image."""
    options = {"steps": 2, "step_size": 0.0, "random_start": False}
    known, fresh = (
        PGD(ThreatModel(), noise=kind, **options)(model, *labelled(40), reevaluations=3) for kind in ("known", "fresh")
    )
    assert 0 < known.success.sum() < 40
    assert torch.equal(known.history["reached"].bool(), known.success.expand(2, -1))
    assert torch.equal(known.predictions, known.predictions[:1].expand(3, -1))
    assert not torch.equal(fresh.history["reached"][-1].bool(), fresh.success)
    assert not torch.equal(fresh.predictions, fresh.predictions[:1].expand(3, -1))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), attempts=st.integers(2, 5), reach=st.sampled_from([0.02, 0.3]), aimed=st.booleans())
def test_the_attempt_of_the_highest_margin_is_chosen(seed: int, attempts: int, reach: float, aimed: bool):
    clean, labels = labelled(4)
    targets = (labels + 1) % CLASSES if aimed else None
    goal, threat = Goal(labels, targets), ThreatModel(eps=reach)
    tried = clean[:, None] + reach * noise(4, attempts, *SHAPE, seed=seed).sign()
    result = Fixed(threat, tried)(linear, clean, labels, targets=targets)
    for image in range(4):
        legal = [threat.project(one[None], clean[image : image + 1]) for one in tried[image]]
        logits = torch.cat([linear(one) for one in legal])
        own = goal.rows(slice(image, image + 1)).repeated(attempts)
        reached = own.reached(logits.argmax(dim=1)).tolist()
        chosen = margin(logits, own).argmax().item()
        assert result.chosen[image].item() == chosen
        assert torch.equal(result.images[image], legal[chosen][0])
        assert torch.equal(result.candidate_predictions[image], logits.argmax(dim=1))
        assert result.success[image].item() == reached[chosen]
        assert result.any_candidate_success[image].item() == any(reached) == reached[chosen]
    torch.testing.assert_close(result.candidates, torch.stack([threat.project(t, clean) for t in tried.unbind(1)], 1))


def test_success_is_that_of_a_reevaluation_and_not_of_the_prediction_it_was_chosen_by():
    images, labels = labelled(60)
    result = Fixed(ThreatModel(), images[:, None].repeat(1, 4, 1, 1, 1))(Noisy(), images, labels)
    assert (result.any_candidate_success & ~result.success).any()
    assert (~result.any_candidate_success & result.success).any()


def result_of(predicted: Tensor, goal: Goal, attempts: Tensor) -> AttackResult:
    nothing = torch.zeros(len(goal.labels))
    success = goal.reached(predicted[0])
    images = [nothing, success, nothing, 0, {}, predicted, nothing, attempts, nothing]
    return AttackResult(*images, goal.labels, goal.targets)


@pytest.mark.parametrize(
    ("targets", "shares", "votes"),
    [(None, [0, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0, 0]), ([1, 2, 1, 0, 0], [0, 0.5, 0.5, 0.25, 0.25], [0, 0, 1, 0, 0])],
)
def test_figures_of_four_predictions(targets: Any, shares: list[float], votes: list[int]):
    """Votes: 0 four times; 1 and 2 tie, the lower wins; the same; 3 twice; 2 twice."""
    predicted = torch.tensor([[0, 1, 2, 3, 2], [0, 1, 1, 3, 0], [0, 2, 1, 0, 2], [0, 2, 2, 1, 1]])
    attempts = torch.tensor([[0, 0], [1, 2], [2, 1], [3, 3], [3, 0]])
    aimed = None if targets is None else torch.tensor(targets)
    result = result_of(predicted, Goal(torch.tensor([0, 1, 1, 3, 2]), aimed), attempts)
    assert result.any_success.tolist() == [False, True, True, True, True]
    assert result.mean_success.tolist() == shares
    assert result.vote_success.tolist() == votes
    assert result.any_candidate_success.tolist() == [False, True, True, False, True]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 6), aimed=st.booleans())
def test_laws_of_the_figures(seed: int, count: int, aimed: bool):
    predicted = (uniform(count, 7, seed=seed) * 3).long()
    labels = (uniform(7, seed=seed + 1) * 3).long()
    goal = Goal(labels, (labels + 1) % 3 if aimed else None)
    result = result_of(predicted, goal, predicted.T)
    assert torch.equal(result.any_success, result.mean_success > 0)
    assert torch.equal(result.any_candidate_success, result.any_success)
    assert ((result.mean_success == 1) <= result.vote_success).all()
    assert (result.success <= result.any_success).all()
    for image, column in enumerate(predicted.T.tolist()):
        counts = [column.count(label) for label in range(3)]
        own = goal.rows(slice(image, image + 1))
        assert result.vote_success[image] == own.reached(torch.tensor([counts.index(max(counts))]))
        hits = sum(bool(own.reached(torch.tensor([label]))) for label in column)
        assert result.mean_success[image].item() == pytest.approx(hits / count)


def test_a_result_prints_counts_and_shares_in_one_line():
    result = outcome("LatentAttack", "linf", restarts=2)
    assert repr(result).startswith("AttackResult(3 images, 4 attempts each, 2 re-evaluations: success ")
    assert f"mean_success {result.mean_success.mean():.3f}, vote_success" in repr(result)
    assert "tensor" not in repr(result)


def nan(images: Tensor) -> Tensor:
    return images.masked_fill(images == images.max(), float("nan"))


def true_once(labels: Tensor) -> Tensor:
    targets = (labels + 1) % CLASSES
    return torch.cat([labels[:1], targets[1:]])


CALLS: dict[str, tuple[type[Exception], str, Any]] = {
    "a list of images": (InputTypeError, "Images", lambda x, y: (x.tolist(), y, {})),
    "8-bit images": (InputTypeError, "255", lambda x, y: ((x * 255).to(torch.uint8), y, {})),
    "images up to 255": (InputValueError, "255", lambda x, y: (x * 255, y, {})),
    "one image": (InputValueError, "Images", lambda x, y: (x[0], y[:1], {})),
    "too bright": (InputValueError, r"\[0, 1\]", lambda x, y: (x + 0.1, y, {})),
    "too dark": (InputValueError, r"\[0, 1\]", lambda x, y: (x - 0.1, y, {})),
    "NaN": (InputValueError, "NaN", lambda x, y: (nan(x), y, {})),
    "infinite": (InputValueError, "finite", lambda x, y: (x / 0, y, {})),
    "float labels": (InputTypeError, "labels", lambda x, y: (x, y.float(), {})),
    "boolean labels": (InputTypeError, "labels", lambda x, y: (x, y > 0, {})),
    "a list of labels": (InputTypeError, "labels", lambda x, y: (x, y.tolist(), {})),
    "too few labels": (InputValueError, "one per image", lambda x, y: (x, y[:2], {})),
    "one-hot labels": (InputValueError, "labels", lambda x, y: (x, torch.nn.functional.one_hot(y, 4), {})),
    "a single label": (InputValueError, "labels", lambda x, y: (x, y[0], {})),
    "negative labels": (InputValueError, "labels", lambda x, y: (x, y - CLASSES, {})),
    "too few targets": (InputValueError, "targets", lambda x, y: (x, y, {"targets": y[:2]})),
    "float targets": (InputTypeError, "targets", lambda x, y: (x, y, {"targets": y.float()})),
    "targets that are true": (
        InputValueError,
        "true classes of 1 of 3",
        lambda x, y: (x, y, {"targets": true_once(y)}),
    ),
    "a target": (InputTypeError, "targets", lambda x, y: (x, y, {"targets": 1})),
    "too few indices": (InputValueError, "indices", lambda x, y: (x, y, {"indices": [1, 2]})),
    "float indices": (InputTypeError, "indices", lambda x, y: (x, y, {"indices": [1.0, 2.0, 3.0]})),
    "no reevaluation": (SettingsError, "PGD.reevaluations", lambda x, y: (x, y, {"reevaluations": 0})),
    "half a reevaluation": (SettingsError, "PGD.reevaluations", lambda x, y: (x, y, {"reevaluations": 0.5})),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls_are_refused_before_the_model_is_evaluated(case: str):
    error, named, change = CALLS[case]
    images, labels, options = change(*labelled())
    model = Noisy()
    with pytest.raises(error, match=named):
        PGD(ThreatModel(), steps=1)(model, images, labels, **options)
    assert not model.seen


@EVERY
def test_labels_beyond_the_models_classes_are_refused(name: str):
    images, labels = labelled()
    with pytest.raises(InputValueError, match="has 4 classes"):
        suite(ThreatModel())[name](wrapped(), images, labels + CLASSES)


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(CmapError):
        SPSA(ThreatModel(), steps=1, pairs=1)(lambda x: linear(x) * float("nan"), *labelled())


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("PGD", "SPSA", "Transfer"))])
def test_attacks_on_latents_name_the_model_that_they_need(name: str):
    with pytest.raises(SettingsError, match=r"needs the latents .* PurifiedClassifier, but the model is function"):
        suite(ThreatModel())[name](linear, *labelled())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda clean: clean[:, None], "must return Candidates(images), but returned Tensor"),
        (lambda clean: None, "must return Candidates(images), but returned NoneType"),
        (lambda clean: Candidates(clean), "return Candidates(images[:, None])"),
        (
            lambda clean: Candidates(clean[:1, None]),
            "[B, M, C, H, W], here [3, M, 3, 8, 6], but returned [1, 1, 3, 8, 6]",
        ),
        (lambda clean: Candidates(clean[:, None, :, :4]), "but returned [3, 1, 3, 4, 6]"),
        (lambda clean: Candidates(clean[:, None][:, :0]), "but returned [3, 0, 3, 8, 6]"),
        (lambda clean: Candidates(clean.numpy()[:, None]), "but returned ndarray"),
        (lambda clean: Candidates(clean[:, None] / 0), "NaN or infinite images"),
        (lambda clean: Candidates(clean[:, None].long()), "but they are torch.int64"),
        (lambda clean: Candidates(clean[:, None], {"loss": clean.new_zeros(3)}), "'loss' is [3]"),
        (lambda clean: Candidates(clean[:, None], {"loss": [0.0]}), "'loss' is list"),
        (lambda clean: Candidates(clean[:, None], None), "'history' is NoneType"),
    ],
)
def test_what_a_search_returns_is_checked(returned: Callable[[Tensor], Any], message: str):
    class Own(Attack):
        def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
            return returned(clean)

    own = Own(THREATS["linf"])
    for attack in (own, Transfer(own)):
        with pytest.raises(AttackError, match="^Own.run .*" + re.escape(message)):
            attack(wrapped(), *labelled())


@pytest.mark.parametrize("names", [("loss", "gain"), ("loss", None), (None, "loss")])
def test_a_history_has_the_same_names_in_each_restart(names: tuple[str | None, str | None]) -> None:
    left = list(names)

    class Own(Attack):
        def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
            name = left.pop(0)
            return Candidates(clean[:, None], {} if name is None else {name: clean.new_zeros(1, len(clean))})

    with pytest.raises(AttackError, match=r"^Own\.run must return a history of the same names in each restart"):
        Own(THREATS["linf"], restarts=2)(linear, *labelled())


def normalised() -> PurifiedClassifier:
    return wrapped(normalize=(0.5, 0.25), inputs="normalized").eval()


def test_a_method_of_a_model_for_normalised_images_is_attacked_on_unit_images() -> None:
    images, labels = labelled()
    plain = PGD(THREATS["linf"], steps=2)(wrapped(normalize=(0.5, 0.25)).eval().undefended, images, labels)
    found = PGD(THREATS["linf"], steps=2)(normalised().undefended, images, labels)
    torch.testing.assert_close(found.images, plain.images)


@pytest.mark.parametrize("inside", [torch.nn.Sequential, torch.nn.DataParallel])
def test_a_model_for_normalised_images_inside_another_is_refused(inside: Any) -> None:
    with pytest.raises(SettingsError, match=rf"In this {inside.__name__} is a PurifiedClassifier for n"):
        PGD(THREATS["linf"], steps=1)(inside(normalised()), *labelled())
    PGD(THREATS["linf"], steps=1)(inside(normalised().variant(inputs="unit")), *labelled())


def test_a_model_that_normalises_for_the_one_inside_is_attacked_as_it_is() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = normalised()

        def forward(self, images: Tensor) -> Tensor:
            return self.inside((images - 0.5) / 0.25)

    result = PGD(ThreatModel(eps=0.0), steps=1)(Outer(), *labelled())
    assert torch.equal(result.images, labelled()[0])


@pytest.mark.parametrize("model", ["fashion-mnist-ct", torch.nn.Linear], ids=["name", "class"])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(SettingsError, match="A model takes images and returns logits"):
        PGD(THREATS["linf"], steps=1)(model, *labelled())


class Own(Loss):
    """A loss of a user's."""

    def __init__(self, returns: Callable[[Tensor, Goal], Any]) -> None:
        self.returns = returns

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        return self.returns(logits, goal)


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda logits, goal: logits.sum(), r"must return one number for each image, \[3\] here, .* but returned \[\]"),
        (lambda logits, goal: logits.sum(dim=2), r"must .* returned \[1, 3\]"),
        (lambda logits, goal: [0.0] * 3, "must .* returned list"),
        (lambda logits, goal: logits.detach().sum(dim=(0, 2)), "does not depend on the logits for autograd"),
    ],
)
def test_what_a_loss_returns_is_checked(returns: Callable[[Tensor, Goal], Any], message: str) -> None:
    with pytest.raises(AttackError, match=f"^Own {message}"):
        PGD(THREATS["linf"], steps=1, loss=Own(returns))(linear, *labelled())
    if "autograd" not in message:
        with pytest.raises(AttackError, match=f"^Own {message}"):
            SPSA(THREATS["linf"], steps=1, loss=Own(returns))(linear, *labelled())


def test_feedback_takes_a_goal_and_a_loss() -> None:
    images, labels = labelled()
    oracle = Oracle(linear, torch.arange(3))
    for goal, loss in ((labels, CrossEntropy()), (Goal(labels), torch.nn.functional.cross_entropy)):
        with pytest.raises(SettingsError, match="feedback takes a Goal"):
            oracle.feedback(images, goal, loss, 1)  # pyright: ignore[reportArgumentType]
