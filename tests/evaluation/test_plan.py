"""From subjects and attacks to tasks: what is done, in which order, and with which attack the checks are made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from attack_toys import linear, wrapped
from cmap_defense.attacks import PGD, SPSA, ShortCMAP, ThreatModel, Transfer
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation import Protocol
from cmap_defense.evaluation.plan import Subject, eps_sizes, probe_of, step_counts, tasks_of
from cmap_defense.evaluation.tasks import AttackTask, ControlTask, GradientTask
from cmap_defense.gradients import StraightThrough

SHAPE = (3, 8, 6)
LINF = ThreatModel(eps=0.1)
L2 = ThreatModel(norm="l2", eps=0.5)
TRANSFER, STEPS = Transfer(PGD(LINF)), PGD(LINF, steps=8, step_size=0.01, eot=3)
PROTOCOL = Protocol(answers=5, repurifications=7, seeds=(0, 1), sanity_images=4, gradient_samples=6)


def subject(**attacks: Any) -> Subject:
    return Subject("defended", linear, {name.replace("_", "-"): attack for name, attack in attacks.items()})


def test_all_that_is_done_and_its_order() -> None:
    other = Subject("other", linear, {"pgd": PGD(LINF, steps=3)})
    tasks = tasks_of([subject(transfer=TRANSFER, pgd=STEPS), other], PROTOCOL, SHAPE)
    assert [task.name for task in tasks] == [
        "defended/control",
        "defended/transfer",
        "defended/pgd",
        "other/control",
        "other/pgd",
        "checks/steps-2",
        "checks/steps-4",
        "checks/eps-0.25x",
        "checks/eps-0.5x",
        "checks/eps-2x",
        "checks/eps-4x",
        "checks/eps-any",
        "checks/gradients",
    ]
    by_name = {task.name: task for task in tasks}
    for task in tasks:
        assert (task.limit, task.once) == ((4, True) if task.subject == "checks" else (None, False))
        if isinstance(task, (AttackTask, ControlTask)):
            assert (task.answers, task.repurifications) == (5, 1 if task.subject == "checks" else 7)
    assert [by_name[f"{name}/control"].search for name in ("defended", "other")] == [8 * 3, 3]
    gradients = by_name["checks/gradients"]
    assert isinstance(gradients, GradientTask)
    assert (gradients.how, gradients.samples) == (STEPS, 6)
    assert by_name["checks/steps-2"].how == PGD(LINF, steps=2, step_size=0.01, eot=3)
    assert by_name["checks/eps-2x"].how == PGD(ThreatModel(eps=0.2), steps=8, eot=3)
    assert by_name["checks/eps-any"].how.threat.eps == 1.0
    assert by_name["defended/pgd"].how == STEPS


def test_what_is_left_out_on_demand() -> None:
    names = [task.name for task in tasks_of([subject(pgd=STEPS)], PROTOCOL.replace(sanity_images=0), SHAPE)]
    assert names == ["defended/control", "defended/pgd"]
    control = tasks_of([subject(pgd=STEPS)], PROTOCOL.replace(search_control=False), SHAPE)[0]
    assert isinstance(control, ControlTask)
    assert control.search == 0
    assert [task.name for task in tasks_of([subject()], PROTOCOL, SHAPE)] == ["defended/control"]


@pytest.mark.parametrize(
    ("attacks", "name"),
    [
        ({"first": PGD(LINF, steps=3), "bpda_eot": STEPS}, "bpda-eot"),
        ({"transfer": TRANSFER, "first": STEPS, "second": PGD(LINF, steps=3)}, "first"),
        ({"known": PGD(LINF, noise="known"), "second": STEPS}, "second"),
        ({"bpda_eot": SPSA(LINF), "second": STEPS}, "second"),
        ({"bpda_eot": PGD(LINF, noise="known"), "second": STEPS}, "second"),
    ],
)
def test_the_checks_are_made_with_a_pgd_on_the_model_itself(attacks: dict[str, Any], name: str) -> None:
    assert probe_of(subject(**attacks)) == (name, STEPS)
    assert "checks/probe" not in [task.name for task in tasks_of([subject(**attacks)], PROTOCOL, SHAPE)]


def test_without_one_the_checks_have_a_probe_of_their_own() -> None:
    name, probe = probe_of(subject(transfer=Transfer(PGD(L2))))
    assert name is None
    assert (probe.threat, probe.gradient, probe.noise) == (L2, None, "fresh")
    purified = Subject("defended", wrapped(), {"short": ShortCMAP(LINF)})
    name, probe = probe_of(purified)
    assert (name, probe.gradient) == (None, StraightThrough())
    tasks = {task.name: task for task in tasks_of([purified], PROTOCOL, SHAPE)}
    assert tasks["checks/probe"].how == probe
    assert "checks/steps-5" in tasks


@pytest.mark.parametrize(("steps", "fewer"), [(1, []), (2, [1]), (3, [1]), (4, [1, 2]), (20, [5, 10])])
def test_fewer_steps(steps: int, fewer: list[int]) -> None:
    assert step_counts(PGD(LINF, steps=steps)) == fewer


@pytest.mark.parametrize(
    ("threat", "sizes"),
    [
        (LINF, {"eps-0.25x": 0.025, "eps-0.5x": 0.05, "eps-2x": 0.2, "eps-4x": 0.4, "eps-any": 1.0}),
        (ThreatModel(eps=0.3), {"eps-0.25x": 0.075, "eps-0.5x": 0.15, "eps-2x": 0.6, "eps-any": 1.0}),
        (ThreatModel(eps=0.25), {"eps-0.25x": 0.0625, "eps-0.5x": 0.125, "eps-2x": 0.5, "eps-any": 1.0}),
        (L2, {"eps-0.25x": 0.125, "eps-0.5x": 0.25, "eps-2x": 1.0, "eps-4x": 2.0, "eps-any": 12.0}),
    ],
)
def test_other_sizes(threat: ThreatModel, sizes: dict[str, float]) -> None:
    found = eps_sizes(PGD(threat), SHAPE)
    assert found == pytest.approx(sizes)
    assert list(found) == list(sizes)
    assert sizes["eps-any"] == (1.0 if threat.norm == "linf" else math.sqrt(3 * 8 * 6))


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/", "/a", "a/../b", "a\\b", "end.", "a:b", "a*", "a?"])
def test_names_that_are_no_words_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="is no name for a file"):
        tasks_of([Subject("defended", linear, {name: STEPS})], PROTOCOL, SHAPE)
    with pytest.raises(SettingsError, match="is no name for a file"):
        tasks_of([Subject(name, linear, {"pgd": STEPS})], PROTOCOL, SHAPE)


def test_names_that_clash_are_refused() -> None:
    with pytest.raises(SettingsError, match="'defended/control' names two tasks"):
        tasks_of([subject(control=STEPS)], PROTOCOL, SHAPE)
    with pytest.raises(SettingsError, match="'other/control' names two tasks"):
        tasks_of([subject(), Subject("other", linear, {"control": STEPS})], PROTOCOL, SHAPE)
    with pytest.raises(SettingsError, match="'checks/steps-2' names two tasks"):
        tasks_of([subject(pgd=STEPS), Subject("checks", linear, {"steps-2": STEPS})], PROTOCOL, SHAPE)
    with pytest.raises(SettingsError, match="names two tasks"):
        tasks_of([Subject("defended", linear, {"pgd": STEPS, "PGD": STEPS})], PROTOCOL, SHAPE)
