"""Each check of the attacks passes and fails as it should, and says so where it could not see."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from attack_toys import linear, wrapped
from cmap_defense.attacks import APGD, PGD, SPSA, Attack, LatentAttack, ShortCMAP, TargetSteer, ThreatModel, Transfer
from cmap_defense.cli.commands import evaluate
from cmap_defense.evaluation.checks import Check, _falls, gradient_table, make_checks
from cmap_defense.evaluation.summary import Runs
from cmap_defense.gradients import Surrogate, Unrolled
from evaluated import runs_of

SHAPE = (3, 8, 6)
LINF = ThreatModel(eps=0.1)
REPEATED = PGD(LINF, steps=4, eot=2)
ATTACKS: dict[str, Attack] = {"transfer": Transfer(PGD(LINF)), "pgd": REPEATED}
IMAGES, PREDICTIONS = 12, 10

CLEAN = "clean images are classified better than by always predicting one class"
FRESH = "the defence draws independent noise for each prediction"
THROUGH = "a gradient attack goes through the defence itself"
START = "a gradient attack starts at random with a step of eps / 4 at least"
GRADIENTS = "no image's gradient is zero throughout an attack"
TRANSFER = "attacks that evaluate the defence are no weaker than transfer"
STEPS = "more steps do not help the defence"
SIZES = "a larger eps does not help the defence"
ANY = "with every image allowed, accuracy is 0"
DIRECTION = "averaged gradients have a direction"
ALL = [CLEAN, FRESH, THROUGH, START, GRADIENTS, TRANSFER, STEPS, SIZES, ANY, DIRECTION]


def runs(share: float | Tensor, name: str = "pgd", again: int = PREDICTIONS, **more: Any) -> Runs:
    """Of each image, or of the images as they are in a tensor, this share of the ten predictions is right."""
    shares = torch.as_tensor(share, dtype=torch.float64).expand(IMAGES)
    right = (torch.arange(PREDICTIONS) < (shares[:, None] * PREDICTIONS).round())[None]
    truth = torch.arange(IMAGES) % 3
    return runs_of(right, right[:, :, :again], truth, attack=name, **({"zero_gradient": False} | more))


def lines(cosines: list[list[float]]) -> list[dict[str, Any]]:
    """Of the gradients of some images: the cosines of averages of 1, 2 and 4."""
    return [{"samples": [1, 2, 4], "cosines": row, "variances": [4.0, 2.0, 1.0]} for row in cosines]


ATTACKED = {"clean": 1.0, "transfer": 0.8, "pgd": 0.2}
CHECKED = {
    "steps-1": 0.6,
    "steps-2": 0.4,
    "eps-0.25x": 0.8,
    "eps-0.5x": 0.5,
    "eps-2x": 0.1,
    "eps-4x": 0.1,
    "eps-any": 0.0,
}
VARIANTS = {"steps-5": 0.6, "steps-10": 0.4, "steps-1": None, "steps-2": None}
"""Of a repeated that is none of the attacks."""

COSINES = [[0.1, 0.2, 0.4], [0.2, 0.3, 0.5], [0.0, 0.1, 0.3]]


def checks(
    *,
    model: Any = linear,
    attacks: Mapping[str, Attack] = ATTACKS,
    attacked: Mapping[str, Any] | None = None,
    checked: Mapping[str, Any] | None = None,
    cosines: list[list[float]] | None = None,
    **more: Any,
) -> dict[str, Check]:
    """By name, for shares of right predictions in place of those above; names whose share is None are left out."""
    found = [
        {
            name: share if isinstance(share, Runs) else runs(share, name, **more)
            for name, share in (given | dict(changed or {})).items()
            if share is not None
        }
        for given, changed in ((ATTACKED, attacked), (CHECKED, checked))
    ]
    table = gradient_table(lines(COSINES if cosines is None else cosines))
    made, _ = make_checks(model, attacks, SHAPE, *found, table)
    assert len({check.name for check in made}) == len(made)
    assert all(check.found for check in made)
    return {check.name: check for check in made}


def states(found: Mapping[str, Check]) -> dict[str, bool | None]:
    return {name: check.passed for name, check in found.items()}


def failed(found: Mapping[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.passed is not True]


def test_attacks_that_work_as_attacks_should_pass_all_checks() -> None:
    found = checks()
    assert list(found) == ALL
    assert states(found) == dict.fromkeys(ALL, True)


def test_labels_of_another_data_set() -> None:
    """All else passes trivially where nothing is answered rightly from the start."""
    wrong = dict.fromkeys(ATTACKED, 0.1)
    found = checks(attacked=wrong, checked=dict.fromkeys(CHECKED, 0.1) | {"eps-any": 0.0})
    assert failed(found) == [CLEAN]
    assert found[CLEAN].found.endswith("against 0.333 for the most frequent class")


def test_a_fixed_seed_is_no_fresh_noise() -> None:
    found = checks(model=wrapped(seed=5))
    assert failed(found) == [FRESH]
    assert found[FRESH].found == "the model has the fixed seed 5"
    assert failed(checks(model=wrapped())) == []


def test_no_gradient_attack_on_the_defence() -> None:
    """It is seen too that none of them takes large steps, and the checks are made with a repeated of their own."""
    variants = {"attack": 0.2} | {"steps-5": 0.6, "steps-10": 0.4, "steps-1": None, "steps-2": None}
    attacks = {"transfer": ATTACKS["transfer"], "spsa": SPSA(LINF)}
    found = checks(attacks=attacks, attacked={"pgd": None, "spsa": 0.2}, checked=variants)
    assert failed(found) == [THROUGH, START]
    assert found[THROUGH].found == "none among the attacks"
    assert found[START].found == "0 of 0"


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"step_size": 0.025}, True),
        ({"step_size": 0.02}, False),
        ({"random_start": False}, False),
        ({"step_size": 0.05, "random_start": False}, False),
    ],
)
def test_small_steps_and_clean_starts_are_weak(changes: dict[str, Any], passes: bool) -> None:
    repeated = dataclasses.replace(REPEATED, **changes)
    assert failed(checks(attacks=ATTACKS | {"pgd": repeated})) == ([] if passes else [START])


@pytest.mark.parametrize(
    ("attack", "model", "passes"),
    [
        (PGD(LINF), wrapped(), True),
        (PGD(LINF, gradient=Unrolled()), wrapped(gradient=Surrogate()), True),
        (PGD(LINF, gradient=Surrogate()), wrapped(), False),
        (PGD(LINF), wrapped(gradient=Surrogate()), False),
        (PGD(LINF, noise="known"), wrapped(), False),
        (APGD(LINF), wrapped(), True),
        (APGD(LINF, gradient=Surrogate()), wrapped(), False),
        (ShortCMAP(LINF), wrapped(), True),
        (ShortCMAP(LINF, gradient=Surrogate()), wrapped(), False),
        (TargetSteer(LINF, gradient=Surrogate()), wrapped(), False),
        (SPSA(LINF), wrapped(), False),
        (LatentAttack(LINF), wrapped(), False),
        (Transfer(PGD(LINF)), wrapped(), False),
    ],
)
def test_what_differentiates_the_defence(attack: Attack, model: Any, passes: bool) -> None:
    """A surrogate in which the loop does not occur is another model, whatever the values are."""
    assert (attack.noise == "fresh" and attack.differentiates_defence(model)) == passes


def test_images_whose_gradient_is_zero_are_counted() -> None:
    still = runs(0.2, zero_gradient=lambda run, image: image in (3, 4))
    found = checks(attacked={"pgd": still})
    assert failed(found) == [GRADIENTS]
    assert found[GRADIENTS].found == "pgd: 2"


@pytest.mark.parametrize(("share", "passes"), [(0.05, True), (0.2, False)])
def test_a_few_gradients_may_be_no_numbers(share: float, passes: bool) -> None:
    found = checks(attacked={"pgd": runs(0.2, nonfinite_gradients=share)})
    assert failed(found) == ([] if passes else [GRADIENTS])
    if not passes:
        assert found[GRADIENTS].found == "pgd: 20% of its gradients were NaN or infinite, which counts as zero"


def test_without_attacks_that_have_a_gradient_nothing_is_checked_of_it() -> None:
    none = {name: runs(share, name, zero_gradient=None) for name, share in ATTACKED.items()}
    found = checks(attacked=none)
    assert states(found)[GRADIENTS] is None
    assert "0 attacks" in found[GRADIENTS].found


def test_a_transfer_that_is_stronger_than_attacks_on_the_defence() -> None:
    found = checks(attacked={"transfer": 0.1})
    assert failed(found) == [TRANSFER]
    assert found[TRANSFER].found == "pgd 0.200, transfer 0.100"
    assert failed(checks(attacked={"transfer": 0.2})) == []


@pytest.mark.parametrize(("wins", "passes"), [(6, True), (9, True), (10, False), (12, False)])
def test_transfer_has_a_tolerance_of_two_standard_errors(wins: int, passes: bool) -> None:
    """A difference of 1 on some images and of -1 on the others: the mean is 2 p - 1, its error
    sqrt((1 - (2 p - 1)^2) / 11)."""
    mine = (torch.arange(IMAGES) < wins).double()
    mean = 2 * wins / IMAGES - 1
    assert passes == (mean <= 2 * math.sqrt((1 - mean**2) / (IMAGES - 1)))
    found = checks(attacked={"pgd": mine, "transfer": 1 - mine, "clean": 1.0}, checked=dict.fromkeys(CHECKED, 0.0))
    assert found[TRANSFER].passed == passes


def test_a_plain_model_needs_no_transfer() -> None:
    found = checks(attacks={"pgd": REPEATED}, attacked={"transfer": None})
    assert TRANSFER not in found
    assert failed(found) == []


def test_the_sweeps() -> None:
    attacked, checked = ({name: runs(share, name) for name, share in part.items()} for part in (ATTACKED, CHECKED))
    found = make_checks(linear, ATTACKS, SHAPE, attacked, checked, [])[1]
    assert [sweep.name for sweep in found] == ["steps", "eps"]
    assert found[0].values == [0, 1, 2, 4]
    assert found[0].accuracies == pytest.approx([1.0, 0.6, 0.4, 0.2])
    assert found[1].values == pytest.approx([0, 0.025, 0.05, 0.1, 0.2, 0.4, 1.0])
    assert found[1].accuracies == pytest.approx([1.0, 0.8, 0.5, 0.2, 0.1, 0.1, 0.0])
    assert found[0].errors == pytest.approx([0.0] * 4, abs=1e-12)


def test_the_errors_of_a_sweep_are_those_of_a_mean_over_images() -> None:
    shares = torch.tensor([0.0, 1.0] * 6)
    attacked, checked = ({name: runs(shares, name) for name in part} for part in (ATTACKED, CHECKED))
    steps, _ = make_checks(linear, ATTACKS, SHAPE, attacked, checked, [])[1]
    assert steps.errors == pytest.approx([math.sqrt(12 / 11 * 0.25 / 12)] * 4)


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"steps-2": 0.7}, [STEPS]),
        ({"steps-1": 0.1}, [STEPS]),
        ({"eps-2x": 0.3}, [SIZES]),
        ({"eps-0.25x": 0.4}, [SIZES]),
        ({"eps-4x": 0.2}, [SIZES]),
        ({"eps-any": 0.1}, []),
        ({"steps-1": 0.4, "eps-0.5x": 0.2}, []),
    ],
)
def test_accuracy_that_rises_along_a_sweep(changed: dict[str, float], wrong: list[str]) -> None:
    found = checks(checked=changed)
    assert failed(found) == wrong
    assert "0: 1.000" in found[STEPS].found
    assert "0.1: 0.200" in found[SIZES].found


@pytest.mark.parametrize(("right", "passes"), [(6, True), (7, True), (11, False)])
def test_a_rise_has_a_tolerance_of_its_standard_error(right: int, passes: bool) -> None:
    """From 5 of 12 images to more of them, image by image, and as chance would explain in six comparisons."""
    shares = [(torch.arange(IMAGES) < count).double() for count in (5, right)]
    gap = shares[1] - shares[0]
    tolerance = student.ppf(1 - 0.05 / 6, IMAGES - 1)  # six pairs of four points
    assert passes == (gap.mean().item() <= tolerance * (gap.std() / math.sqrt(IMAGES)).item())
    found = checks(checked={"steps-1": shares[0], "steps-2": shares[1]})
    assert found[STEPS].passed == passes


def test_a_rise_is_seen_image_by_image() -> None:
    """From a quarter of the predictions to 0.65: chance would explain it of other images, but all of it is on images
    that had none right before."""
    before = torch.tensor([1.0] * 3 + [0.0] * 9)
    after = torch.tensor([1.0] * 3 + [0.0] * 3 + [0.8] * 6)
    found = checks(checked={"steps-1": before, "steps-2": after})
    assert failed(found) == [STEPS]


def test_a_rise_over_several_points_is_seen() -> None:
    """None of its steps is large, the whole is."""
    slow = [(torch.arange(IMAGES) < count).double() for count in (2, 4, 7, 10)]
    points = dict(zip(("eps-0.25x", "eps-0.5x", "eps-2x", "eps-4x"), slow, strict=True))
    found = checks(attacked={"pgd": slow[1]}, checked=points)
    assert found[SIZES].passed is False


@pytest.mark.parametrize("count", [4, 7])
def test_chance_alone_seldom_makes_a_rise(count: int) -> None:
    """Of images that are equally hard at each of some points, in 5 % of the sweeps or less."""
    torch.manual_seed(0)
    rises = 0
    for _ in range(400):
        chance = torch.empty(16, 1).uniform_(0.1, 0.9).expand(16, 11)
        points = {float(value): torch.bernoulli(chance).mean(dim=1).double() for value in range(count)}
        rises += not _falls("eps", points, REPEATED).passed
    assert rises <= 0.05 * 400 + 2 * math.sqrt(0.05 * 0.95 * 400)


def test_one_image_says_nothing_of_a_rise_or_a_direction() -> None:
    one = {name: runs(share, name).first(1) for name, share in CHECKED.items()}
    found = checks(checked=one, cosines=COSINES[:1])
    assert failed(found) == [STEPS, SIZES, DIRECTION]
    assert {found[name].passed for name in (STEPS, SIZES, DIRECTION)} == {None}
    assert "--sanity-images 16" in found[STEPS].reason


def test_images_of_one_class_say_nothing_of_the_labels() -> None:
    right = torch.ones(1, IMAGES, PREDICTIONS, dtype=torch.bool)
    found = checks(attacked={"clean": runs_of(right, right, torch.zeros(IMAGES, dtype=torch.int64), attack="clean")})
    assert failed(found) == [CLEAN]
    assert found[CLEAN].passed is None
    assert "several classes" in found[CLEAN].remedy


def test_an_attack_that_does_nothing_makes_no_rise() -> None:
    right = (torch.arange(10) < 5).expand(1, IMAGES, 10)
    again = torch.ones(1, IMAGES, 20, dtype=torch.bool)
    same = {name: runs_of(right, again, attack=name, zero_gradient=False) for name in ATTACKED}
    fewer = {name: runs_of(right, again[:, :, :1], attack=name, zero_gradient=False) for name in CHECKED}
    for sweep in make_checks(linear, ATTACKS, SHAPE, same, fewer, [])[1]:
        assert len(set(sweep.accuracies)) == 1


def test_something_is_left_although_every_image_is_allowed() -> None:
    """An image keeps its vote; a wrong one now and then is no matter."""
    kept = torch.zeros(IMAGES)
    kept[5] = 0.6
    found = checks(checked={"eps-any": kept})
    assert failed(found) == [ANY]
    assert found[ANY].found == "1 of 12 images keep their vote"
    kept[5] = 0.4
    assert failed(checks(checked={"eps-any": kept})) == []


@pytest.mark.parametrize(
    ("eot", "shown"), [(1, "cosine 0.100 ± 0.058 between two averages of 1"), (3, "0.200"), (4, "of 4"), (9, "of 4")]
)
def test_the_direction_is_that_of_averages_of_the_attacks_size(eot: int, shown: str) -> None:
    attacks = ATTACKS | {"pgd": dataclasses.replace(REPEATED, eot=eot)}
    assert shown in checks(attacks=attacks)[DIRECTION].found


def test_the_table_of_gradients() -> None:
    given = lines(COSINES)
    given[0]["variances"] = [100.0, 50.0, 25.0]
    table = gradient_table(given)
    assert [row["samples"] for row in table] == [1, 2, 4]
    assert [row["cosine"] for row in table] == pytest.approx([0.1, 0.2, 0.4])
    assert [row["error"] for row in table] == pytest.approx([0.1 / math.sqrt(3)] * 3)
    assert [row["variance"] for row in table] == [4.0, 2.0, 1.0]
    assert gradient_table(lines(COSINES[:1]))[0]["error"] == 0.0


def test_without_the_tasks_of_the_checks_only_the_attacks_are_checked() -> None:
    found, sweeps = make_checks(linear, ATTACKS, SHAPE, {n: runs(s, n) for n, s in ATTACKED.items()}, {}, [])
    assert sweeps == []
    assert [check.name for check in found] == ALL[:7]
    assert [check.passed for check in found] == [True] * 6 + [None]
    assert found[-1].found == "not measured"


def options_named(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text))


def assert_remedies(found: Mapping[str, Check], titles: list[str]) -> None:
    """Each of these did not pass, and says what to do in options that there are."""
    known = {option for parameter in evaluate.params for option in parameter.opts}
    for title in titles:
        check = found[title]
        assert check.passed is not True
        assert check.reason.endswith(f"{check.found}. {check.remedy}")
        assert check.remedy.endswith(".")
        assert options_named(check.remedy) or "PurifiedClassifier(" in check.remedy, title
        assert options_named(check.remedy) <= known


def test_each_check_says_what_to_do_about_it() -> None:
    """All of those that can fail, and all of those that could not be made."""
    repeated = dataclasses.replace(REPEATED, random_start=False)
    attacked = {"clean": 0.1, "transfer": 0.2, "pgd": runs(0.8, zero_gradient=True)}
    worse = dict.fromkeys(CHECKED, 0.0) | {"eps-any": 1.0}
    cosines = [[0.0, 0.0, 0.0], [0.1, -0.1, 0.1], [-0.1, 0.1, -0.1]]
    attacks = ATTACKS | {"pgd": repeated}
    found = checks(model=wrapped(seed=5), attacks=attacks, attacked=attacked, checked=worse, cosines=cosines)
    blind = checks(
        attacks={"transfer": ATTACKS["transfer"]}, attacked={"pgd": None}, checked={"attack": 0.2, **VARIANTS}
    )
    assert_remedies(found, [title for title in ALL if title != THROUGH])
    assert_remedies(blind, [THROUGH, START, TRANSFER])
    unseen = runs(0.2, zero_gradient=None)
    nothing = checks(attacked={"pgd": unseen, **{n: runs(1.0, n, zero_gradient=None) for n in ("clean", "transfer")}})
    assert_remedies(nothing, [GRADIENTS])
    assert_remedies(checks(cosines=[]), [DIRECTION])


def test_the_remedies_are_made_for_the_attack() -> None:
    found = checks(attacked={"transfer": 0.1, "pgd": 0.8})
    assert "--steps 8 --eot 4" in found[TRANSFER].remedy
    cosines = [[0.0, 0.0, 0.0], [0.1, -0.1, 0.1], [-0.1, 0.1, -0.1]]
    assert "--eot 8" in checks(cosines=cosines)[DIRECTION].remedy
