"""Settings of the loop and of how it is carried out."""

from typing import Any

import pytest

from cmap_defense.errors import SettingsError
from cmap_defense.training.settings import Execution, TrainSettings


def test_json_round_trips_are_exact() -> None:
    settings = TrainSettings(images=123, ema_half_lives=(500, 20), betas=(0.5, 0.9), learning_rate=1e-5)
    assert TrainSettings.from_json(settings.to_json()) == settings
    assert TrainSettings.from_dict(settings.to_dict()).ema_half_lives == (500, 20)
    execution = Execution(compile=True, part_mb=16)
    assert Execution.from_json(execution.to_json()) == execution


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", 0),
        ("batch_size", 1.5),
        ("warmup_images", -1),
        ("learning_rate", 0.0),
        ("betas", (0.9, 1.0)),
        ("clip_norm", -1.0),
        ("ema_half_lives", ()),
        ("ema_half_lives", 30_000),
        ("ema_half_lives", (30_000, 0)),
        ("ema_half_lives", (30_000, 30_000)),
        ("ema_half_lives", (30_000, 0.5)),
        ("flip", 1),
        ("precision", "float16"),
        ("checkpoint_every", 0),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"TrainSettings\.{name}"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("compile", None), ("channels_last", 1), ("hold_images", "no"), ("part_mb", 0)]
)
def test_a_wrong_way_to_carry_it_out_is_named(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"Execution\.{name}"):
        Execution(**{name: value})


@pytest.mark.parametrize(("images", "batch", "steps"), [(100, 10, 10), (101, 10, 11), (1, 128, 1)])
def test_all_images_are_seen(images: int, batch: int, steps: int) -> None:
    assert TrainSettings(images=images, batch_size=batch).steps == steps


@pytest.mark.parametrize(("every", "batch", "steps"), [(100, 10, 10), (109, 10, 10), (5, 10, 1)])
def test_checkpoints_come_as_often_as_asked_for(every: int, batch: int, steps: int) -> None:
    assert TrainSettings(checkpoint_every=every, batch_size=batch).checkpoint_steps == steps
