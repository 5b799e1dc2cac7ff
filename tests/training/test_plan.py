"""A time budget, by a clock of the tests: when a call stops, and how long a training is chosen to be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmap_defense.errors import CheckpointError, SettingsError
from cmap_defense.ranks import Ranks
from cmap_defense.training import loop, plan
from cmap_defense.training.budget import Budget
from cmap_defense.training.checkpoint import save_checkpoint
from cmap_defense.training.learner import Learner
from cmap_defense.training.loop import Trained, train
from cmap_defense.training.objectives import CT
from cmap_defense.training.plan import Speed, plan_images, planned, read_plan
from cmap_defense.training.settings import Execution, TrainSettings
from training.clock import Clock
from training.killed import NETWORK, SETTINGS, fresh_backbone, training_images

STEP, SAVE = 12.0, 10.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A machine on which a step takes twelve seconds, and a checkpoint ten."""
    made = Clock()
    monkeypatch.setattr(Learner, "step", made.taking(STEP, Learner.step))
    for module in (plan, loop):
        monkeypatch.setattr(module, "save_checkpoint", made.taking(SAVE, save_checkpoint))
    return made


def learner(**changes: Any) -> Learner:
    chosen = SETTINGS.replace(**changes)
    return Learner(fresh_backbone(), training_images(), None, CT(), chosen, Execution(), Ranks())


def chosen(folder: Path, minutes: float, clock: Clock, described: dict[str, Any] | None = None) -> TrainSettings:
    budget = Budget(minutes, clock)
    return planned(learner(), folder, {"data": {"images": 50}} if described is None else described, budget, Execution())


# --- the budget -------------------------------------------------------------------------------------------------------


def test_a_budget_counts_down() -> None:
    clock = Clock()
    budget = Budget(1.5, clock)
    assert budget.left == 90.0
    clock.now += 100
    assert budget.left == -10.0


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), "ten"])
def test_a_budget_of_nothing_is_refused(minutes: Any) -> None:
    with pytest.raises(SettingsError, match=r"Budget\.minutes"):
        Budget(minutes)


# --- the plan ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    step=st.floats(1e-3, 10),
    save=st.floats(0, 60),
    seconds=st.floats(-10, 10_000),
    batch=st.integers(1, 512),
    every=st.integers(1, 10**5),
)
def test_a_planned_training_fits_and_fills_its_time(
    step: float, save: float, seconds: float, batch: int, every: int
) -> None:
    """Of the steps and the checkpoints, and one more pair for the last ones; whole steps, or none."""
    settings = TrainSettings(batch_size=batch, checkpoint_every=every)
    images = plan_images(settings, Speed(step, save), seconds)
    steps, rest = divmod(images, batch)
    assert rest == 0
    assert steps >= 0

    def lasts(steps: int) -> float:
        return step * steps + save * (steps / settings.checkpoint_steps + 2)

    if steps > 0:
        assert lasts(steps) <= seconds * 1.000001
    assert lasts(steps + 1) > 0.94 * seconds


def test_the_schedule_ends_inside_the_budget(tmp_path: Path, clock: Clock) -> None:
    """Ten minutes, the trial's steps and all checkpoints included, and little of them unused."""
    begun = clock.now
    found = chosen(tmp_path, 10.0, clock)
    assert found == SETTINGS.replace(images=found.images)
    outcome = train(
        fresh_backbone(), training_images(), CT(), found, tmp_path, described={}, budget=Budget(10.0, clock)
    )
    assert outcome.finished
    assert outcome.steps == found.steps > 30
    assert 0.9 * 600 < clock.now - begun < 600


def test_the_chosen_length_is_kept_for_the_calls_that_continue(tmp_path: Path, clock: Clock) -> None:
    """Whatever minutes they are given; nothing is measured again."""
    first = chosen(tmp_path, 4.0, clock)
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["images"] == first.images
    assert kept["minutes"] == 4.0
    assert kept["images_per_second"] == pytest.approx(SETTINGS.batch_size / STEP)
    assert kept["settings"]["data"] == {"images": 50}
    assert "images" not in kept["settings"]["train"]
    before = clock.now
    assert chosen(tmp_path, 60.0, clock) == first
    assert clock.now == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_measuring_leaves_the_weights_and_the_folder_as_they_were(tmp_path: Path, clock: Clock) -> None:
    made = learner()
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    speed = plan.measure(made, tmp_path / "new", Budget(1.0, clock), Execution())
    assert (speed.step, speed.checkpoint) == (pytest.approx(STEP), pytest.approx(SAVE))
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in made.model.parameters())
    assert list((tmp_path / "new").iterdir()) == []


def test_what_is_done_beside_a_checkpoint_counts(tmp_path: Path, clock: Clock) -> None:
    """Once it is warm; the model is in eval mode."""
    seen: list[bool] = []

    def beside(model: Any) -> None:
        seen.append(model.training)
        clock.now += 4.0 if len(seen) > 1 else 100.0

    speed = plan.measure(learner(), tmp_path, Budget(1.0, clock), Execution(), beside)
    assert speed.checkpoint == pytest.approx(SAVE + 4.0)
    assert seen == [False, False]


def test_measuring_takes_a_small_part_of_the_budget(tmp_path: Path, clock: Clock) -> None:
    """Five per cent at most, or a few steps."""
    for minutes, steps in ((1.0, 3 + 5), (20.0, 3 + 5), (21.0, 3 + 10)):
        begun = clock.now
        plan.measure(learner(), tmp_path, Budget(minutes, clock), Execution())
        assert clock.now - begun == pytest.approx(steps * STEP + SAVE)


def test_a_budget_that_the_trial_used_up_is_refused(tmp_path: Path, clock: Clock) -> None:
    """And leaves no plan, to which later calls would keep."""
    with pytest.raises(SettingsError, match=r"0\.01 minutes are too few: .*a step takes 12 s, a checkpoint 10 s"):
        chosen(tmp_path, 0.01, clock)
    assert list(tmp_path.iterdir()) == []
    assert chosen(tmp_path, 10.0, clock).steps > 30


def test_what_a_killed_trial_left_behind_is_removed(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / ".trial-old").mkdir()
    (tmp_path / ".trial-old" / "half").write_bytes(b"half")
    chosen(tmp_path, 10.0, clock)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_training_is_the_same_with_a_plan_and_without(tmp_path: Path, clock: Clock) -> None:
    """The trial leaves no trace in it; what dropout draws, in the model and in its target, is the same too."""
    config = dataclasses.replace(NETWORK, dropout=0.3)

    def trained(folder: Path, found: TrainSettings, model: Any) -> Trained:
        return train(model, training_images(), CT(), found, folder, described={})

    model = fresh_backbone(config)
    made = Learner(model, training_images(), None, CT(), SETTINGS, Execution(), Ranks())
    found = planned(made, tmp_path / "a", {}, Budget(4.0, clock), Execution())
    (one,) = trained(tmp_path / "a", found, model).averages
    (other,) = trained(tmp_path / "b", found, fresh_backbone(config).eval()).averages
    for name, average in one.weights.items():
        assert torch.equal(average, other.weights[name])


def test_a_plan_of_other_settings_is_refused(tmp_path: Path, clock: Clock) -> None:
    chosen(tmp_path, 4.0, clock)
    with pytest.raises(CheckpointError, match=r"data\.images: 50 before, 51 now"):
        chosen(tmp_path, 1.0, clock, {"data": {"images": 51}})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"images": 0, "minutes": 1, "images_per_second": 1, "settings": {}}']
)
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CheckpointError, match="Delete it"):
        read_plan(tmp_path, {})
