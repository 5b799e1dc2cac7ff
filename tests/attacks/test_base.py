"""What holds for every attack: a legal image, a fresh judgement that can be repeated by hand, and refused nonsense."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import (
    CLASSES,
    NAMES,
    SHAPE,
    THREATS,
    Fixed,
    Noisy,
    base_seeds,
    labelled,
    linear,
    reevaluation_seeds,
    search_seeds,
    suite,
    wrapped,
)
from cmap_defense.attacks import PGD, SPSA, AttackResult, Goal, LatentAttack, ThreatModel, Transfer, Undefended
from cmap_defense.attacks.goal import margin
from cmap_defense.errors import CmapError, InputTypeError, InputValueError, SettingsError
from toys import noise, uniform

EVERY = pytest.mark.parametrize("name", NAMES)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
INDICES = range(3)


@functools.cache
def outcome(name: str, norm: str, **options: Any) -> AttackResult:
    """An attack on three images behind CMAP, made once, re-evaluated twice."""
    return suite(THREATS[norm], seed=5, **options)[name](wrapped(), *labelled(), reevaluations=2)


def answers_by_hand(result: AttackResult, seeds: Tensor, images: Tensor | None = None) -> Tensor:
    """The wrapper's answer to the result's images under given noise."""
    with torch.no_grad():
        return wrapped()(result.images if images is None else images, seeds=seeds).argmax(dim=1)


# ---------------------------------------------------------------------------------------------- what every attack gives


@EVERY
@NORMS
def test_images_and_candidates_are_legal_and_projecting_them_again_changes_nothing(name: str, norm: str):
    result, (clean, _), threat = outcome(name, norm), labelled(), THREATS[norm]
    for images in (result.images, *result.candidates.unbind(dim=1)):
        assert images.min() >= 0
        assert images.max() <= 1
        assert (threat.distance(images, clean) <= threat.eps * (1 + 1e-6)).all()
        torch.testing.assert_close(threat.project(images, clean), images, rtol=0, atol=2e-7)
        assert not images.requires_grad
    assert torch.equal(result.distance, threat.distance(result.images, clean))
    assert (result.distance > 0).all()


@EVERY
@NORMS
def test_the_judgement_can_be_repeated_by_hand(name: str, norm: str):
    """With the seeds that the documentation of the noise promises: attempts first, then the choice."""
    result, (_, labels) = outcome(name, norm), labelled()
    count = result.candidates.shape[1]
    asked = count if count > 1 else 0
    for judgement, answer in enumerate(result.predictions):
        assert torch.equal(answers_by_hand(result, reevaluation_seeds(INDICES, 5, asked + judgement + 1)), answer)
    for place, images in enumerate(result.candidates.unbind(dim=1)):
        expected = answers_by_hand(result, reevaluation_seeds(INDICES, 5, place + 1), images)
        assert torch.equal(expected, result.candidate_predictions[:, place])
    assert torch.equal(result.success, result.predictions[0] != labels)
    assert torch.equal(result.success, Goal(labels).reached(result.predictions[0]))


@EVERY
def test_known_noise_is_that_of_the_search_and_of_every_answer(name: str):
    result, (_, labels) = outcome(name, "linf", noise="known"), labelled()
    answer = answers_by_hand(result, base_seeds(INDICES, 5))
    assert torch.equal(result.predictions, answer.expand(2, -1))
    assert torch.equal(result.success, answer != labels)
    for place, images in enumerate(result.candidates.unbind(dim=1)):
        expected = answers_by_hand(result, base_seeds(INDICES, 5), images)
        assert torch.equal(expected, result.candidate_predictions[:, place])


@EVERY
def test_shapes(name: str):
    result, (clean, labels) = outcome(name, "linf"), labelled()
    count = result.candidates.shape[1]
    assert result.images.shape == clean.shape
    assert result.success.shape == result.distance.shape == (3,)
    assert result.success.dtype == torch.bool
    assert result.predictions.shape == (2, 3)
    assert result.predictions.dtype == torch.int64
    assert result.candidates.shape == (3, count, *SHAPE)
    assert result.candidate_predictions.shape == (3, count)
    assert result.chosen.shape == (3,)
    assert result.chosen.dtype == torch.int64
    assert torch.equal(result.images, result.candidates[torch.arange(3), result.chosen])
    assert count > 1 or not result.chosen.any()
    assert torch.equal(result.labels, labels)
    assert result.targets is None
    attack = suite(THREATS["linf"])[name]
    steps = attack.attack.steps if isinstance(attack, Transfer) else attack.steps
    assert result.history
    for values in result.history.values():
        assert values.shape == (steps, 3)
        assert torch.isfinite(values).all()


@EVERY
def test_restarts_add_attempts_of_other_noise(name: str):
    once, more = outcome(name, "linf"), outcome(name, "linf", restarts=2)
    count = once.candidates.shape[1]
    assert more.candidates.shape[1] == 2 * count
    torch.testing.assert_close(more.candidates[:, :count], once.candidates, rtol=0, atol=1e-6)
    different = (more.candidates[:, count:] - more.candidates[:, :count]).abs().flatten(1).amax(dim=1)
    assert (different > 1e-3).all()
    for column, values in more.history.items():
        assert len(values) == 2 * len(once.history[column])


@EVERY
@pytest.mark.parametrize(("seed", "known"), [(None, "fresh"), (None, "known"), (1, "fresh")])
def test_an_empty_batch_gives_an_empty_result(name: str, seed: int | None, known: str):
    images, labels = labelled()
    attack = suite(THREATS["l2"], noise=known)[name]
    result = attack(wrapped(seed=seed), images[:0], labels[:0], reevaluations=2)
    assert result.images.shape == (0, *SHAPE)
    assert result.predictions.shape == (2, 0)
    for values in (result.success, result.any_success, result.vote_success, result.any_candidate_success):
        assert values.shape == (0,)
        assert values.dtype == torch.bool
    assert result.mean_success.shape == result.distance.shape == result.chosen.shape == (0,)


@pytest.mark.parametrize("model", [linear, wrapped(seed=1)], ids=["plain", "with a seed of its own"])
def test_an_empty_batch_is_fine_for_a_model_that_takes_no_seeds_with_known_noise(model: Any):
    images, labels = labelled()
    assert PGD(ThreatModel(), noise="known")(model, images[:0], labels[:0]).images.shape == (0, *SHAPE)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_with_known_noise_start_elsewhere(norm: str):
    result = PGD(THREATS[norm], steps=1, noise="known", restarts=2)(wrapped(), *labelled())
    assert (result.candidates[:, 0] - result.candidates[:, 1]).abs().max() > 1e-3


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_half_precision_are_attacked_and_given_back_in_single(name: str, dtype: torch.dtype):
    """Rounded back they could be outside the ball by more than a tenth of it."""
    images, labels = labelled()
    half, attack = images.to(dtype), suite(THREATS["linf"], seed=5)[name]
    result, expected = (attack(wrapped(), part, labels) for part in (half, half.float()))
    assert result.images.dtype == result.candidates.dtype == result.distance.dtype == torch.float32
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.candidates, expected.candidates)
    assert torch.equal(result.distance, expected.distance)
    assert torch.equal(THREATS["linf"].project(result.images, half.float()), result.images)
    assert (result.distance <= 0.1 * (1 + 1e-6)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_ball_around_images_of_half_precision_is_kept(norm: str, dtype: torch.dtype):
    """An eps below the spacing of bfloat16 numbers near 1, which is 1/128."""
    images, labels = labelled(6)
    half, threat = (0.5 + images / 2).to(dtype), ThreatModel(norm=norm, eps=1e-3 if norm == "linf" else 1e-2)
    result = PGD(threat, steps=3, seed=1)(linear, half, labels)
    assert result.images.dtype == torch.float32
    assert (threat.distance(result.images, half.float()) <= threat.eps * (1 + 1e-4)).all()
    assert (result.distance > 0.5 * threat.eps).all()
    assert (result.images.to(dtype) != result.images).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_and_targets_of_any_integers(dtype: torch.dtype):
    (images, labels), attack = labelled(), PGD(THREATS["linf"], steps=1)
    targets = (labels + 1) % CLASSES
    for given_targets in (None, targets):
        expected = attack(linear, images, labels, targets=given_targets)
        other = None if given_targets is None else given_targets.to(dtype)
        result = attack(linear, images, labels.to(dtype), targets=other)
        assert torch.equal(result.images, expected.images)
        assert result.labels.dtype == torch.int64
        assert torch.equal(result.success, expected.success)


@EVERY
def test_a_targeted_attack_wants_its_target_and_nothing_else(name: str):
    images, labels = labelled()
    targets = (labels + 1) % CLASSES
    attack = suite(THREATS["linf"], seed=5)[name]
    if name == "ConsistencyDisruption released":
        with pytest.raises(SettingsError, match="takes no targets"):
            attack(wrapped(), images, labels, targets=targets)
        return
    result = attack(wrapped(), images, labels, targets=targets, reevaluations=2)
    assert torch.equal(result.targets, targets)
    assert torch.equal(result.success, result.predictions[0] == targets)
    assert torch.equal(result.any_candidate_success, (result.candidate_predictions == targets[:, None]).any(dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_the_target_changes_what_is_searched(name: str):
    images, labels = labelled()
    attack = suite(THREATS["linf"], seed=5)[name]
    aims = [(labels + shift) % CLASSES for shift in (1, 2)]
    try:
        found = [attack(wrapped(), images, labels, targets=targets).candidates for targets in aims]
    except CmapError:
        return  # an attack that cannot be targeted may say so
    assert (found[0] - found[1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------ the count


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
    calls = {"model": 0, "source": 0}

    def model(images: Tensor) -> Tensor:
        calls["model"] += 1
        return linear(images)

    def source(images: Tensor) -> Tensor:
        calls["source"] += 1
        return linear(images)

    if isinstance(attack, Transfer):
        attack = Transfer(attack.attack, source=source)
    result = attack(model, *labelled(), reevaluations=reevaluations)
    assert calls == {"model": own + reevaluations - 1, "source": others}
    assert result.queries == calls["model"] + calls["source"]


def test_a_bar_counts_the_queries(capsys: pytest.CaptureFixture[str]):
    result = PGD(ThreatModel(), steps=3)(linear, *labelled(), progress=True)
    assert f"PGD: {result.queries}evaluation" in capsys.readouterr().err
    PGD(ThreatModel(), steps=3)(linear, *labelled())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("known", "distinct"), [("fresh", 3 * 2 + 3), ("known", 1)])
def test_every_evaluation_has_noise_of_its_own_unless_it_is_known(known: str, distinct: int):
    model = Noisy()
    PGD(ThreatModel(), steps=3, eot=2, noise=known)(model, *labelled(), reevaluations=3)
    assert len(model.seen) == 3 * 2 + 3
    for image in INDICES:
        assert len({seeds[image].item() for seeds in model.seen if seeds is not None}) == distinct
    assert len({seed for seeds in model.seen if seeds is not None for seed in seeds.tolist()}) == 3 * distinct


def test_seeds_of_a_search_are_those_promised():
    model = Noisy()
    PGD(ThreatModel(), steps=1, eot=2, seed=8, restarts=2)(model, *labelled(), indices=[3, 4, 5])
    where = range(3, 6)
    expected = [search_seeds(where, 8, 1), search_seeds(where, 8, 2)]
    expected += [search_seeds(where, 8, evaluation, restart=1) for evaluation in (3, 4)]
    expected += [reevaluation_seeds(where, 8, evaluation) for evaluation in (1, 2, 3)]
    assert [seeds.tolist() for seeds in model.seen if seeds is not None] == [seeds.tolist() for seeds in expected]


def test_known_noise_judges_as_the_search_saw_and_fresh_noise_does_not():
    """Steps of size 0: the search and the judgement see one and the same image."""
    images, labels = labelled(40)
    seen, judged = {}, {}
    for known in ("known", "fresh"):
        attack = PGD(ThreatModel(), steps=2, step_size=0.0, random_start=False, noise=known)
        result = attack(Noisy(), images, labels)
        seen[known], judged[known] = result.history["reached"][-1].bool(), result.success
    assert 0 < seen["known"].sum() < 40
    assert torch.equal(seen["known"], judged["known"])
    assert not torch.equal(seen["fresh"], judged["fresh"])


def test_a_plain_random_model_is_judged_under_known_noise_as_it_was_searched():
    def model(images: Tensor) -> Tensor:
        return linear(images + torch.randn_like(images) * images)

    images, labels = labelled(40)
    attack = PGD(ThreatModel(), steps=2, step_size=0.0, random_start=False, noise="known")
    result = attack(model, images, labels, reevaluations=3)
    assert 0 < result.success.sum() < 40
    assert torch.equal(result.history["reached"].bool(), result.success.expand(2, -1))
    assert torch.equal(result.predictions, result.predictions[:1].expand(3, -1))
    fresh = PGD(ThreatModel(), steps=2, step_size=0.0, random_start=False)(model, images, labels, reevaluations=3)
    assert not torch.equal(fresh.predictions, fresh.predictions[:1].expand(3, -1))


# ----------------------------------------------------------------------------------------------------------- the choice


@settings(max_examples=40)
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
        own = Goal(goal.labels[image].expand(attempts), None if targets is None else targets[image].expand(attempts))
        reached = own.reached(logits.argmax(dim=1)).tolist()
        chosen = margin(logits, own).argmax().item()
        assert result.chosen[image].item() == chosen
        assert torch.equal(result.images[image], legal[chosen][0])
        assert torch.equal(result.candidate_predictions[image], logits.argmax(dim=1))
        assert result.success[image].item() == reached[chosen]
        assert result.any_candidate_success[image].item() == any(reached) == reached[chosen]
    torch.testing.assert_close(result.candidates, torch.stack([threat.project(t, clean) for t in tried.unbind(1)], 1))


def test_the_choice_is_by_one_answer_each_of_a_random_model():
    """By hand, with the seeds of the judgement; a later answer may well be another."""
    clean, labels = labelled(30)
    tried = clean[:, None] + 0.03 * noise(30, 3, *SHAPE, seed=4).sign()
    threat = ThreatModel(eps=0.03)
    result = Fixed(threat, tried)(Noisy(), clean, labels)
    leads = torch.stack(
        [
            margin(
                Noisy()(threat.project(part, clean), seeds=reevaluation_seeds(range(30), 0, place + 1)), Goal(labels)
            )
            for place, part in enumerate(tried.unbind(dim=1))
        ],
        dim=1,
    )
    assert torch.equal(result.chosen, leads.argmax(dim=1))
    assert set(result.chosen.tolist()) == {0, 1, 2}
    assert torch.equal(result.images, result.candidates[torch.arange(30), result.chosen])
    first = (leads > 0).float().argmax(dim=1)
    assert (result.chosen[(leads > 0).any(dim=1)] != first[(leads > 0).any(dim=1)]).any()


def test_working_ones_and_others_are_chosen_from_every_place():
    clean, labels = labelled(30)
    tried = clean[:, None] + 0.03 * noise(30, 3, *SHAPE, seed=4).sign()
    result = Fixed(ThreatModel(eps=0.03), tried)(linear, clean, labels)
    assert 0 < result.any_candidate_success.sum() < 30
    places = (result.candidates == result.images[:, None]).flatten(2).all(dim=2).float().argmax(dim=1)
    assert set(places.tolist()) == {0, 1, 2}
    assert torch.equal(result.chosen, places)


def test_success_is_that_of_a_fresh_answer_and_not_of_the_one_it_was_chosen_by():
    images, labels = labelled(60)
    result = Fixed(ThreatModel(), images[:, None].repeat(1, 4, 1, 1, 1))(Noisy(), images, labels)
    assert (result.any_candidate_success & ~result.success).any()
    assert (~result.any_candidate_success & result.success).any()


def test_a_single_attempt_is_answered_once():
    images, labels = labelled()
    model = Noisy()
    result = Fixed(ThreatModel(), images[:, None])(model, images, labels, reevaluations=2)
    assert len(model.seen) == result.queries == 2
    assert torch.equal(result.candidate_predictions[:, 0], result.predictions[0])


# --------------------------------------------------------------------------------------------------------- the readings

ANSWERS = torch.tensor([[0, 1, 2, 3, 2], [0, 1, 1, 3, 0], [0, 2, 1, 0, 2], [0, 2, 2, 1, 1]])
LABELS = torch.tensor([0, 1, 1, 3, 2])


def read(targets: list[int] | None = None) -> AttackResult:
    """Four answers for each of five images."""
    nothing = torch.zeros(5)
    aimed = None if targets is None else torch.tensor(targets)
    success = Goal(LABELS, aimed).reached(ANSWERS[0])
    attempts = torch.tensor([[0, 0], [1, 2], [2, 1], [3, 3], [3, 0]])
    return AttackResult(nothing, success, nothing, 0, {}, ANSWERS, nothing, attempts, nothing, LABELS, aimed)


def test_readings_of_the_answers():
    result = read()
    assert result.any_success.tolist() == [False, True, True, True, True]
    assert result.mean_success.tolist() == [0, 0.5, 0.5, 0.5, 0.5]
    # votes: 0 four times; 1 and 2 tie, the lower is right; likewise; 3 twice is right; 2 twice is right
    assert result.vote_success.tolist() == [False, False, False, False, False]
    assert result.any_candidate_success.tolist() == [False, True, True, False, True]


def test_readings_of_the_answers_for_targets():
    result = read([1, 2, 1, 0, 0])
    assert result.any_success.tolist() == [False, True, True, True, True]
    assert result.mean_success.tolist() == [0, 0.5, 0.5, 0.25, 0.25]
    assert result.vote_success.tolist() == [False, False, True, False, False]
    assert result.any_candidate_success.tolist() == [False, True, True, False, True]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 6), aimed=st.booleans())
def test_laws_of_the_readings(seed: int, count: int, aimed: bool):
    answers = (uniform(count, 7, seed=seed) * 3).long()
    labels = (uniform(7, seed=seed + 1) * 3).long()
    targets = (labels + 1) % 3 if aimed else None
    goal, nothing = Goal(labels, targets), torch.zeros(7)
    success = goal.reached(answers[0])
    result = AttackResult(nothing, success, nothing, 0, {}, answers, nothing, answers.T, nothing, labels, targets)
    assert torch.equal(result.any_success, result.mean_success > 0)
    assert torch.equal(result.any_candidate_success, result.any_success)
    assert ((result.mean_success == 1) <= result.vote_success).all()
    assert (success <= result.any_success).all()
    for image, column in enumerate(answers.T.tolist()):
        counts = [column.count(label) for label in range(3)]
        assert result.vote_success[image] == goal.rows(slice(image, image + 1)).reached(
            torch.tensor([counts.index(max(counts))])
        )
        hits = sum(label == targets[image] if targets is not None else label != labels[image] for label in column)
        assert result.mean_success[image].item() == pytest.approx(hits / count)


# ------------------------------------------------------------------------------------------------------------- nonsense


def nan(images: Tensor) -> Tensor:
    return images.masked_fill(images == images.max(), float("nan"))


CALLS: dict[str, tuple[type[Exception], Any]] = {
    "a list of images": (InputTypeError, lambda x, y: (x.tolist(), y, {})),
    "8-bit images": (InputTypeError, lambda x, y: ((x * 255).to(torch.uint8), y, {})),
    "one image": (InputValueError, lambda x, y: (x[0], y[:1], {})),
    "too bright": (InputValueError, lambda x, y: (x + 0.1, y, {})),
    "too dark": (InputValueError, lambda x, y: (x - 0.1, y, {})),
    "NaN": (InputValueError, lambda x, y: (nan(x), y, {})),
    "infinite": (InputValueError, lambda x, y: (x / 0, y, {})),
    "float labels": (InputTypeError, lambda x, y: (x, y.float(), {})),
    "boolean labels": (InputTypeError, lambda x, y: (x, y > 0, {})),
    "a list of labels": (InputTypeError, lambda x, y: (x, y.tolist(), {})),
    "too few labels": (InputValueError, lambda x, y: (x, y[:2], {})),
    "one-hot labels": (InputValueError, lambda x, y: (x, torch.nn.functional.one_hot(y, 4), {})),
    "a single label": (InputValueError, lambda x, y: (x, y[0], {})),
    "too few targets": (InputValueError, lambda x, y: (x, y, {"targets": y[:2]})),
    "float targets": (InputTypeError, lambda x, y: (x, y, {"targets": y.float()})),
    "a target": (InputTypeError, lambda x, y: (x, y, {"targets": 1})),
    "too few indices": (InputValueError, lambda x, y: (x, y, {"indices": [1, 2]})),
    "float indices": (InputTypeError, lambda x, y: (x, y, {"indices": [1.0, 2.0, 3.0]})),
    "no judgement": (SettingsError, lambda x, y: (x, y, {"reevaluations": 0})),
    "half a judgement": (SettingsError, lambda x, y: (x, y, {"reevaluations": 0.5})),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls_are_refused_before_the_model_is_asked(case: str):
    error, change = CALLS[case]
    images, labels, options = change(*labelled())
    model = Noisy()
    with pytest.raises(error):
        PGD(ThreatModel(), steps=1)(model, images, labels, **options)
    assert not model.seen


@pytest.mark.parametrize("shift", [CLASSES, -CLASSES])
def test_labels_beyond_the_models_classes_are_refused(shift: int):
    images, labels = labelled()
    with pytest.raises(CmapError):
        PGD(ThreatModel(), steps=1)(linear, images, labels + shift)


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_refuses_labels_beyond_the_models_classes(name: str):
    images, labels = labelled()
    with pytest.raises(InputValueError, match="has 4 classes"):
        suite(ThreatModel())[name](wrapped(), images, labels + CLASSES)


def test_an_answer_that_is_no_number_is_no_success():
    images, labels = labelled()
    try:
        result = SPSA(ThreatModel(), steps=1, pairs=1)(lambda x: linear(x) * float("nan"), images, labels)
    except CmapError:
        return  # as the wrapper refuses such logits of its classifier
    assert not result.success.any()


def test_wrong_indices_are_refused_by_their_name():
    images, labels = labelled()
    with pytest.raises(InputValueError, match="indices"):
        PGD(ThreatModel(), steps=1)(linear, images, labels, indices=[1, 2])


@pytest.mark.parametrize(
    "change",
    [
        {"threat": "linf"},
        {"threat": 8 / 255},
        {"threat": None},
        {"restarts": 0},
        {"restarts": -1},
        {"restarts": 1.5},
        {"restarts": True},
        {"seed": 0.5},
        {"seed": None},
        {"seed": "0"},
        {"noise": "frozen"},
        {"noise": None},
    ],
    ids=repr,
)
@EVERY
def test_options_of_every_attack_are_checked(name: str, change: dict[str, Any]):
    (option,) = change
    if name.startswith("Transfer") and option != "threat":
        name = "PGD"
    attack = type(suite(ThreatModel())[name])
    if attack is Transfer:
        attack = PGD
    options = {"threat": ThreatModel()} | change
    with pytest.raises(SettingsError, match=f"{attack.__name__}.{option}"):
        attack(**options)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("PGD", "SPSA", "Transfer"))])
def test_attacks_on_latents_say_which_model_they_need(name: str):
    with pytest.raises(SettingsError, match=r"needs the latents .* PurifiedClassifier, but the model is function"):
        suite(ThreatModel())[name](linear, *labelled())


def test_a_seed_of_numpys_is_a_seed():
    attacks = [PGD(ThreatModel(), steps=1, seed=seed) for seed in (3, np.int64(3))]  # pyright: ignore
    first, second = (attack(linear, *labelled()).images for attack in attacks)
    assert torch.equal(first, second)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63, 2**70 + 3])
def test_seeds_of_any_size(seed: int):
    result = PGD(ThreatModel(), steps=1, seed=seed)(wrapped(), *labelled())
    other = PGD(ThreatModel(), steps=1, seed=0)(wrapped(), *labelled())
    assert not torch.equal(result.images, other.images)


@EVERY
def test_attacks_are_values(name: str):
    first, again, other = (suite(THREATS["linf"], seed=seed)[name] for seed in (1, 1, 2))
    assert first == again
    assert hash(first) == hash(again)
    assert first != other
    assert repr(first) == repr(again)
    assert "seed=1" in repr(first)
    with pytest.raises(AttributeError):
        first.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_names_of_the_suite_are_reachable():
    assert Undefended() == Transfer(PGD(ThreatModel())).source
    assert LatentAttack(ThreatModel()).threat.eps == 8 / 255
