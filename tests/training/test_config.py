"""Settings of a training."""

import dataclasses

import pytest
import torch

from cmap_defense.training import TrainingConfig


def test_json_round_trips_are_exact() -> None:
    config = TrainingConfig(images=123, ema_half_life=(500, 20), betas=(0.5, 0.9), compile=True, micro_batch=3)
    assert TrainingConfig.from_json(config.to_json()) == config
    assert TrainingConfig.from_dict(config.to_dict()).ema_half_life == (500, 20)


def test_the_device_may_be_one_of_torch() -> None:
    assert TrainingConfig(device=torch.device("cuda", 1)) == TrainingConfig(device="cuda:1")  # pyright: ignore[reportArgumentType]


def test_what_may_change_when_a_training_is_continued_is_not_compared() -> None:
    one = TrainingConfig(images=8)
    changes = {"minutes": 3.0, "weights": "float16", "device": "meta", "compile": True, "channels_last": True}
    more = {"hold_images": False, "checkpoint_part_mb": 15, "micro_batch": 2}
    assert one.replace(**changes, **more).reproducible() == one.reproducible()
    for name in one.reproducible():
        assert name not in changes | more
    assert {field.name for field in dataclasses.fields(one)} == {*one.reproducible(), *changes, *more}


def test_every_field_but_betas_has_the_help_of_an_option() -> None:
    phrases = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(TrainingConfig)}
    assert [name for name, phrase in phrases.items() if not phrase.endswith(".")] == ["betas"]


@pytest.mark.parametrize(("images", "batch", "steps"), [(100, 10, 10), (101, 10, 11), (1, 128, 1), (None, 10, 10**5)])
def test_all_images_are_seen(images: int | None, batch: int, steps: int) -> None:
    assert TrainingConfig(images=images, batch_size=batch).steps == steps


@pytest.mark.parametrize(("every", "batch", "steps"), [(100, 10, 10), (109, 10, 10), (5, 10, 1)])
def test_checkpoints_come_as_often_as_set(every: int, batch: int, steps: int) -> None:
    assert TrainingConfig(checkpoint_every=every, batch_size=batch).checkpoint_steps == steps
