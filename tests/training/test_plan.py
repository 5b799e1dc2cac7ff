"""Minutes, by a clock of the tests: when a call stops, and which length is chosen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmap_defense.common.ranks import Ranks
from cmap_defense.errors import CheckpointError, SettingsError
from cmap_defense.training import TrainingConfig, loop, plan
from cmap_defense.training.checkpoint import save_checkpoint
from cmap_defense.training.learner import Learner
from cmap_defense.training.loop import countdown, train
from cmap_defense.training.objectives import CT
from cmap_defense.training.plan import Speed, as_before, measure, plan_images, planned_images, read_plan
from training.clock import Clock
from training.trained import CONFIG, NETWORK, learner

STEP, SAVE = 12.0, 10.0
PARTS = {"data": {"images": 50}}
OPEN = CONFIG.replace(images=None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A machine on which a step takes twelve seconds, and a checkpoint ten."""
    made = Clock()
    monkeypatch.setattr(Learner, "step", made.taking(STEP, Learner.step))
    for module in (plan, loop):
        monkeypatch.setattr(module, "save_checkpoint", made.taking(SAVE, save_checkpoint))
    return made


def chosen(folder: Path, minutes: float, clock: Clock, parts: dict[str, Any] = PARTS) -> TrainingConfig:
    """The settings of a training with these minutes, the length being that of the calls before or a new one."""
    config = as_before(OPEN.replace(minutes=minutes), folder, parts, Ranks())
    if config.images is not None:
        return config
    made = learner(CT(), config)
    return config.replace(images=planned_images(made, folder, parts, countdown(minutes, clock)))


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
    config = TrainingConfig(batch_size=batch, checkpoint_every=every)
    steps, rest = divmod(plan_images(config, Speed(step, save), seconds), batch)
    assert rest == 0
    assert steps >= 0

    def lasts(steps: int) -> float:
        return step * steps + save * (steps / config.checkpoint_steps + 2)

    if steps > 0:
        assert lasts(steps) <= seconds * 1.000001
    assert lasts(steps + 1) > 0.94 * seconds


def test_the_schedule_ends_inside_the_minutes(tmp_path: Path, clock: Clock) -> None:
    """Ten minutes, the steps of the measurement and all checkpoints included, and little of them unused."""
    begun, left = clock.now, countdown(10.0, clock)
    found = chosen(tmp_path, 10.0, clock)
    assert found == CONFIG.replace(images=found.images, minutes=10.0)
    assert train(learner(CT(), found), tmp_path, parts=PARTS, seconds_left=left) == found.steps > 25
    assert 0.9 * 600 < clock.now - begun < 600


def test_the_chosen_length_is_kept_for_the_calls_that_continue(tmp_path: Path, clock: Clock) -> None:
    """Whatever minutes they are given, or none; nothing is measured again. Other settings are refused."""
    first = chosen(tmp_path, 4.0, clock)
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert (kept["images"], kept["minutes"]) == (first.images, 4.0)
    assert kept["images_per_second"] == pytest.approx(CONFIG.batch_size / STEP)
    assert kept["settings"]["data"] == {"images": 50}
    assert "images" not in kept["settings"]["train"]
    before = clock.now
    assert chosen(tmp_path, 60.0, clock).images == first.images
    assert as_before(OPEN, tmp_path, PARTS, Ranks()).images == first.images
    assert clock.now == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(CheckpointError, match=r"data\.images: 50 before, 51 now"):
        chosen(tmp_path, 1.0, clock, {"data": {"images": 51}})


def test_measuring_leaves_the_weights_and_the_folder_as_they_were(tmp_path: Path, clock: Clock) -> None:
    """Other work at checkpoints counts too, once it is warm; the model is in eval mode then."""
    made, seen = learner(config=OPEN.replace(minutes=1.0)), []

    def beside(learner: Learner) -> None:
        seen.append(learner.model.training)
        clock.now += 4.0 if len(seen) > 1 else 100.0

    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    speed = measure(made, tmp_path / "new", countdown(1.0, clock), beside)
    assert (speed.step, speed.checkpoint) == (pytest.approx(STEP), pytest.approx(SAVE + 4.0))
    assert seen == [False, False]
    assert made.model.training
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in made.model.parameters())
    assert list((tmp_path / "new").iterdir()) == []


def test_minutes_that_the_measurement_used_up_are_refused(tmp_path: Path, clock: Clock) -> None:
    """And leave no plan, to which later calls would keep; what a killed measurement left behind is removed."""
    (tmp_path / ".trial-old").mkdir()
    (tmp_path / ".trial-old" / "half").write_bytes(b"half")
    with pytest.raises(SettingsError, match=r"0\.01 minutes are too few: .*a step takes 12 s, a checkpoint 10 s"):
        chosen(tmp_path, 0.01, clock)
    assert list(tmp_path.iterdir()) == []


def test_a_training_is_the_same_with_a_plan_and_without(tmp_path: Path, clock: Clock) -> None:
    """The measurement leaves no trace in it; what dropout draws, in the model and in its target, is the same too."""
    network, config = NETWORK.replace(dropout=0.3), OPEN.replace(minutes=4.0)
    made = learner(CT(), config, network)
    config = config.replace(images=planned_images(made, tmp_path / "a", {}, countdown(4.0, clock)))
    one, other = learner(CT(), config, network, model=made.model), learner(CT(), config, network)
    for folder, each in (("a", one), ("b", other)):
        train(each, tmp_path / folder)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"images": 0, "minutes": 1, "images_per_second": 1, "settings": {}}']
)
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CheckpointError, match="Delete it"):
        read_plan(tmp_path, {})
