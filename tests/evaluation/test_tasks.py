"""The work on one group: what its lines hold, against the same computed directly."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_toys import QUICK, THREATS, Noisy, labelled, linear, suite, wrapped
from cmap_defense.attacks import PGD, SPSA, Attack, LatentAttack, Margin, ThreatModel, Transfer, VoteMargin
from cmap_defense.evaluation.answers import ask
from cmap_defense.evaluation.describe import attack_settings
from cmap_defense.evaluation.protocol import answer_seeds, run_indices
from cmap_defense.evaluation.tasks import (
    CONTROL,
    AttackTask,
    ControlTask,
    GradientTask,
    Group,
    Outcome,
)
from cmap_defense.gradients import Surrogate
from cmap_defense.rng import derived_seeds
from evaluated import Shaky
from toys import uniform

LINF = THREATS["linf"]
POSITIONS = torch.tensor([31, 4, 12])
RUN = 3
ANSWERS, AGAIN = 3, 2


def group(images: Tensor | None = None, labels: Tensor | None = None) -> Group:
    """Three images somewhere in a data set, in some run."""
    if images is None or labels is None:
        images, labels = labelled(3)
    positions = POSITIONS[: len(images)]
    return Group(images, labels, positions, run_indices(positions, RUN))


def attacked(model: Any, how: Attack, given: Group | None = None) -> Outcome:
    task = AttackTask("someone", "something", model, how, ANSWERS, AGAIN)
    return task.run(given or group())


def shaken(images: Tensor) -> Tensor:
    """A random model that draws from torch's global generator."""
    return linear(images + 0.3 * torch.randn_like(images))


def column(outcome: Outcome, name: str) -> list[Any]:
    return [line[name] for line in outcome.lines]


# --- attacks ----------------------------------------------------------------------------------------------------------

HOW = {
    "PGD": PGD(LINF, steps=2, eot=2),
    "PGD, two attempts": PGD(LINF, steps=2, keep="best", seed=5),
    "PGD, two restarts": PGD(LINF, steps=1, restarts=2),
    "PGD, known noise": PGD(LINF, steps=2, noise="known"),
    "SPSA": SPSA(LINF, steps=2, pairs=2),
    "Transfer": Transfer(PGD(LINF, steps=2)),
    "LatentAttack": LatentAttack(LINF, steps=3, latents=2),
}


@pytest.mark.parametrize("name", HOW)
def test_an_attacks_lines_and_tensors(name: str) -> None:
    """The attack with the group's noise indices, then answers 0 to N + R - 1 about its images."""
    model, how, given = wrapped(), HOW[name], group()
    outcome = attacked(model, how)
    result = how(model, given.images, given.labels, indices=given.indices)
    heard = torch.stack(
        [model(result.images, seeds=answer_seeds(given.indices, n)).argmax(dim=1) for n in range(ANSWERS + AGAIN)]
    )
    assert column(outcome, "image") == POSITIONS.tolist()
    assert column(outcome, "label") == given.labels.tolist()
    assert column(outcome, "answers") == heard[:ANSWERS].T.tolist()
    assert column(outcome, "repurified") == heard[ANSWERS:].T.tolist()
    assert column(outcome, "queries") == [result.queries] * 3
    assert column(outcome, "distance") == result.distance.tolist()
    norms = result.history.get("gradient_norm")
    assert column(outcome, "zero_gradient") == [None if norms is None else False] * 3

    further = ask(model, result.images, given.labels, given.indices, range(ANSWERS + AGAIN))
    assert further.one_latent is not None
    assert column(outcome, "one_latent") == pytest.approx(further.one_latent.mean(dim=0).tolist())
    assert further.on_the_way is not None
    assert column(outcome, "on_the_way") == further.on_the_way.T.tolist()

    loop = {f"loop.{field}" for field in ("l1", "ssim", "latent", "total", "latent_mean", "latent_std")}
    history = {f"history.{field}" for field in result.history}
    assert set(outcome.tensors) == {"images", "purified"} | loop | history
    assert torch.equal(outcome.tensors["images"], result.images)
    for field, values in result.history.items():
        assert torch.equal(outcome.tensors[f"history.{field}"], values)
        assert outcome.tensors[f"history.{field}"].shape[1] == 3
    assert outcome.tensors["loop.total"].shape == (QUICK.iterations, 3)
    for line in outcome.lines:
        assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_a_model_without_latents_has_no_figures_of_them() -> None:
    outcome = attacked(linear, PGD(LINF, steps=2))
    assert column(outcome, "one_latent") == column(outcome, "on_the_way") == [None] * 3
    assert set(outcome.tensors) == {"images", "history.loss", "history.gradient_norm", "history.reached"}


def test_another_run_has_other_noise() -> None:
    model, given = wrapped(), group()
    runs = [
        attacked(model, HOW["PGD"], dataclasses.replace(given, indices=run_indices(POSITIONS, run))) for run in (0, 3)
    ]
    assert not torch.equal(runs[0].tensors["images"], runs[1].tensors["images"])
    assert column(runs[0], "answers") != column(runs[1], "answers")


def test_a_gradient_of_zero_is_in_the_line_and_warns_nobody() -> None:
    """Of dark images; warnings are errors here."""

    def blind(images: Tensor) -> Tensor:
        dark = images.flatten(1).mean(dim=1, keepdim=True) < 0.5
        logits = linear(images)
        return torch.where(dark, logits.detach(), logits)

    images = torch.cat([0.2 * uniform(1, 3, 8, 6, seed=0), 1 - 0.2 * uniform(2, 3, 8, 6, seed=1)])
    outcome = attacked(blind, PGD(LINF, steps=2), group(images, torch.tensor([0, 1, 2])))
    assert column(outcome, "zero_gradient") == [True, False, False]


# --- while searching --------------------------------------------------------------------------------------------------

SEARCHES = {
    **HOW,
    "PGD, all of it": PGD(LINF, steps=3, eot=2, restarts=2, keep="best", loss=VoteMargin()),
    "SPSA, all of it": SPSA(LINF, steps=2, pairs=3, restarts=2, keep="best"),
    "SPSA, other noise": SPSA(LINF, steps=2, pairs=2, common_noise=False),
    "PGD, far": PGD(ThreatModel(eps=0.8), steps=2),
    "PGD, near": PGD(ThreatModel(eps=1e-6), steps=2),
}


@pytest.mark.parametrize("name", [name for name in SEARCHES if name.startswith(("PGD", "SPSA"))])
def test_the_answers_heard_while_searching_are_counted(name: str) -> None:
    """All that the model was asked but for the choice between the attempts, where there are some, and one judgement;
    and whether one of those answers was wrong, the choice's included. By known noise it is one answer again and
    again."""
    model, how, given = Shaky(0.3), SEARCHES[name], group()
    result = how(model, given.images, given.labels, indices=given.indices)
    attempts = result.candidates.shape[1]
    heard = torch.stack(model.answers[:-1])
    chosen = attempts if attempts > 1 else 0
    assert len(model.answers) == result.queries == len(heard) + 1
    unrelated = 1 if how.noise == "known" else len(heard) - chosen
    assert how.predictions_per_image() == unrelated

    outcome = attacked(Shaky(0.3), how)
    assert column(outcome, "search_answers") == [unrelated + chosen] * 3
    assert column(outcome, "searched") == (heard != given.labels).any(dim=0).tolist()


def test_those_searches_hear_right_and_wrong_answers() -> None:
    found = [attacked(Shaky(0.3), how) for name, how in SEARCHES.items() if name.startswith(("PGD", "SPSA"))]
    searched = [line["searched"] for outcome in found for line in outcome.lines]
    assert True in searched
    assert False in searched


def test_a_search_that_asks_something_else_hears_no_answers() -> None:
    names = {
        name: how.predictions_per_image() for name, how in suite(LINF).items() if not name.startswith(("PGD", "SPSA"))
    }
    assert set(names.values()) == {0}
    one = attacked(wrapped(), HOW["Transfer"])
    assert column(one, "searched") == column(one, "search_answers") == [None] * 3
    attempts = attacked(wrapped(), HOW["LatentAttack"])
    assert column(attempts, "search_answers") == [2] * 3
    result = HOW["LatentAttack"](wrapped(), group().images, group().labels, indices=group().indices)
    assert column(attempts, "searched") == result.any_candidate_success.tolist()


# --- clean images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [wrapped(), Noisy(), linear], ids=["purified", "seeded", "function"])
def test_the_control_is_an_attack_of_no_size(model: Any) -> None:
    control = ControlTask("someone", model, ANSWERS, AGAIN, search=0).run(group())
    nothing = attacked(model, PGD(ThreatModel(eps=0.0), steps=1, step_size=0.0))
    for name in ("image", "label", "answers", "repurified", "one_latent", "on_the_way"):
        assert column(control, name) == column(nothing, name)
    assert column(control, "search") == [[]] * 3
    assert torch.equal(control.tensors["images"], nothing.tensors["images"])
    assert torch.equal(control.tensors["images"], group().images)
    assert control.tensors.keys() == {name for name in nothing.tensors if not name.startswith("history.")}


def test_the_control_goes_on_asking_as_long_as_a_search() -> None:
    given, model = group(), wrapped()
    outcome = ControlTask("someone", model, ANSWERS, AGAIN, search=4).run(given)
    numbers = range(ANSWERS + AGAIN, ANSWERS + AGAIN + 4)
    heard = torch.stack([model(given.images, seeds=answer_seeds(given.indices, n)).argmax(dim=1) for n in numbers])
    assert column(outcome, "search") == heard.T.tolist()
    assert (heard != heard[0]).any()


def test_the_lines_do_not_hang_on_the_group() -> None:
    """An image in a group of its own, with the model in chunks."""
    model, whole = wrapped(max_parallel=3), group()
    tasks = [
        AttackTask("someone", "something", model, PGD(LINF, steps=2, eot=2), ANSWERS, AGAIN),
        ControlTask("someone", model, ANSWERS, AGAIN, search=2),
        GradientTask("someone", model, PGD(LINF), 4),
    ]
    for task in tasks:
        outcome = task.run(whole)
        for row in range(3):
            alone = Group(*(part[row : row + 1] for part in (whole.images, whole.labels, POSITIONS, whole.indices)))
            (line,) = task.run(alone).lines
            for name, value in outcome.lines[row].items():
                close = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
                if name in ("cosines", "variances"):
                    close = pytest.approx(value, rel=1e-3, abs=1e-5)
                assert line[name] == close, name


# --- gradients --------------------------------------------------------------------------------------------------------


def drawn_gradients(model: Any, how: PGD, given: Group, samples: int) -> np.ndarray:
    """[samples, B, elements]: of the loss at the random start, each with the next noise of the attack's seed."""
    from cmap_defense.attacks.goal import Goal
    from cmap_defense.attacks.steps import random_point

    base = derived_seeds(given.indices, how.seed)
    found = []
    for number in range(1, samples + 1):
        point = random_point(how.threat, given.indices, given.images).requires_grad_()
        logits = model(point, seeds=derived_seeds(base, number))
        (gradient,) = torch.autograd.grad(how.loss(logits[None], Goal(given.labels)).sum(), point)
        found.append(gradient.flatten(1))
    return torch.stack(found).double().numpy()


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (Noisy(3.0), PGD(LINF, seed=2)),
        (Noisy(3.0), PGD(THREATS["l2"], loss=Margin())),
        (wrapped(gradient=Surrogate()), PGD(LINF, eot=3)),
    ],
    ids=["linf", "l2", "purified"],
)
def test_cosines_and_variances(model: Any, how: PGD) -> None:
    samples, given = 9, group()
    outcome = GradientTask("someone", model, how, samples).run(given)
    assert dict(outcome.tensors) == {}
    gradients = drawn_gradients(model, how, given, samples)
    for row, line in enumerate(outcome.lines):
        assert (line["image"], line["label"]) == (POSITIONS[row], given.labels[row])
        assert line["samples"] == [1, 2, 4]
        own = gradients[:, row]
        for n, cosine, variance in zip(line["samples"], line["cosines"], line["variances"], strict=True):
            one, other = own[:n].mean(axis=0), own[n : 2 * n].mean(axis=0)
            assert cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-4)
            means = np.stack([own[start : start + n].mean(axis=0) for start in range(0, samples - n + 1, n)])
            expected = means.var(axis=0, ddof=1).sum() / (own.mean(axis=0) ** 2).sum()
            assert variance == pytest.approx(expected, rel=1e-4)
        assert max(line["cosines"]) < 0.9999


def test_the_gradient_mode_of_the_attack_is_the_one_looked_at() -> None:
    given = group()
    alone = GradientTask("someone", wrapped(gradient=Surrogate()), PGD(LINF), 4).run(given)
    asked = GradientTask("someone", wrapped(), PGD(LINF, gradient=Surrogate()), 4).run(given)
    assert asked.lines == alone.lines
    assert GradientTask("someone", wrapped(), PGD(LINF), 4).run(given).lines != alone.lines


def test_a_model_without_noise_has_one_direction_and_no_variance() -> None:
    for line in GradientTask("someone", linear, PGD(LINF), 4).run(group()).lines:
        assert line["cosines"] == pytest.approx([1.0, 1.0])
        assert line["variances"] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_a_gradient_of_zero_has_no_direction() -> None:
    for line in GradientTask("someone", lambda images: linear(0 * images), PGD(LINF), 4).run(group()).lines:
        assert line["cosines"] == line["variances"] == [0.0, 0.0]


# --- functions of the group alone -------------------------------------------------------------------------------------

TASKS = {
    "attack": lambda: AttackTask("someone", "something", shaken, PGD(LINF, steps=2), ANSWERS, AGAIN),
    "control": lambda: ControlTask("someone", shaken, ANSWERS, AGAIN, search=2),
    "gradients": lambda: GradientTask("someone", shaken, PGD(LINF), 4),
}


@pytest.mark.parametrize("name", TASKS)
def test_torchs_generators_are_left_alone_and_have_no_say(name: str) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(TASKS[name]().run(group()).lines)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tasks_run_where_no_gradients_are_kept(mode: Any) -> None:
    """As attacks do. The tensors of the group were made there too."""
    model = Noisy()
    tasks = [
        AttackTask("someone", "something", model, PGD(LINF, steps=2), ANSWERS, AGAIN),
        ControlTask("someone", model, ANSWERS, AGAIN, search=2),
        GradientTask("someone", model, PGD(LINF), 4),
    ]
    outside = [task.run(group()).lines for task in tasks]
    with mode():
        assert [task.run(group()).lines for task in tasks] == outside


def test_names_and_descriptions() -> None:
    tasks = [
        AttackTask("someone", "something", linear, PGD(LINF), ANSWERS, AGAIN, limit=4, once=True),
        ControlTask("someone", linear, ANSWERS, AGAIN, search=2),
        GradientTask("checks", linear, PGD(LINF), 4, limit=4),
    ]
    assert [task.name for task in tasks] == ["someone/something", f"someone/{CONTROL}", "checks/gradients"]
    assert [task.describe() for task in tasks] == [
        {"attack": repr(PGD(LINF)), "settings": attack_settings(PGD(LINF)), "images": 4, "once": True},
        {"attack": None, "search": 2, "images": None, "once": False},
        {"attack": repr(PGD(LINF)), "settings": attack_settings(PGD(LINF)), "samples": 4, "images": 4, "once": True},
    ]
