"""Whole trainings: what is written beside the checkpoints, where the first weights come from, what the record says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.test_network_names import TINY
from cmap_defense import load_backbone
from cmap_defense.backbones import ConsistencyBackbone, Network
from cmap_defense.backbones.folder import read_record, write_backbone
from cmap_defense.backbones.networks import refuse_other_network
from cmap_defense.common.files import LOCK_FILE
from cmap_defense.errors import CheckpointError, DataError, SettingsError
from cmap_defense.training import run as module
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.loop import TrainState, countdown
from cmap_defense.training.objectives import CT, ECT, EDM
from cmap_defense.training.plan import PLAN_FILE
from cmap_defense.training.run import TrainedBackbone, train_backbone
from training.trained import CONFIG, training_images, training_labels

NETWORK = Network.named("compact", (1, 8, 8), TINY["compact"])
BRIEF = CONFIG.replace(images=24, checkpoint_every=16)
"""3 steps, checkpoints after 2 and 3."""


def record_of(config: TrainingConfig) -> dict[str, Any]:
    return {"name": "tiny", "licence": "CC0", "training": {"command": f"--images {config.images}"}}


def trained(folder: Path, **options: Any) -> TrainedBackbone:
    given: dict[str, Any] = {"network": NETWORK, "objective": ECT(), "config": BRIEF, "record": record_of}
    return train_backbone(training_images(), folder, **given | options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK_FILE)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_training_leaves_a_backbone_checkpoints_and_a_log(tmp_path: Path) -> None:
    sheets: list[Tensor] = []
    done = trained(tmp_path, on_samples=sheets.append)
    assert names(tmp_path) == ["backbone", "checkpoint-00000002", "checkpoint-00000003", "log.jsonl"]
    assert (done.images_seen, done.finished, done.config) == (24, True, BRIEF)
    assert not done.model.training
    assert_same(load_backbone(tmp_path / "backbone"), done.model)
    assert len(sheets) == 2
    assert all(sheet.shape == (64, 1, 8, 8) for sheet in sheets)
    record = read_record(tmp_path / "backbone")
    assert (record.name, record.licence, record.kind, record.num_classes) == ("tiny", "CC0", "consistency", None)
    assert record.training == {
        "command": "--images 24",
        "train": BRIEF.reproducible(),
        "objective": ECT().describe(),
        "images": 50,
        "images_seen": 24,
    }


def test_every_half_life_has_its_folder_at_the_end(tmp_path: Path) -> None:
    """The first one's is the backbone, and the same as without the others."""
    done = trained(tmp_path / "two", config=BRIEF.replace(ema_half_life=(50, 1)))
    assert [name for name in names(tmp_path / "two") if "backbone" in name] == ["backbone", "backbone-1"]
    assert_same(load_backbone(tmp_path / "two" / "backbone"), done.model)
    for folder, half_life in (("backbone", 50), ("backbone-1", 1)):
        alone = trained(tmp_path / str(half_life), config=BRIEF.replace(ema_half_life=(half_life,)))
        assert_same(load_backbone(tmp_path / "two" / folder), alone.model)
    assert read_record(tmp_path / "two" / "backbone-1").training["images_seen"] == 24


@pytest.mark.parametrize(("name", "classes"), [("compact", 2), ("ncsnpp", None), ("imagenet64", 2)])
def test_all_networks_can_be_trained_class_by_class_where_they_have_classes(
    tmp_path: Path, name: str, classes: int | None
) -> None:
    network = Network.named(name, (1, 8, 8), TINY[name], num_classes=classes)
    labels = None if classes is None else training_labels()
    config, given = BRIEF.replace(images=8), {"network": network, "objective": CT()}
    done = trained(tmp_path, labels=labels, config=config, on_samples=lambda sheet: None, **given)
    backbone = load_backbone(tmp_path / "backbone")
    assert backbone.num_classes == classes
    assert_same(backbone, done.model)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    arguments = () if classes is None else (torch.tensor([0, 1]),)
    assert backbone.generate(latents, *arguments).shape == latents.shape
    if labels is not None:
        with pytest.raises(CheckpointError, match=r"data\.sha256"):
            trained(tmp_path, labels=1 - labels, config=config, **given)


def test_figures_in_the_record_of_the_same_weights_are_kept(tmp_path: Path) -> None:
    """And settings and presets; a training whose length was left open has that of the call before."""
    trained(tmp_path)
    record, file = read_record(tmp_path / "backbone"), tmp_path / "backbone" / "backbone.json"
    presets = {"fast": {"purifier": "one-step", "level": 0.4}}
    found = record.replace(figures={"measured": {"accuracy": 0.5}}, settings={"n_latents": 3}, presets=presets)
    file.write_text(found.to_json(indent=2))
    assert trained(tmp_path, config=BRIEF.replace(images=None)).config == BRIEF
    assert read_record(tmp_path / "backbone") == found
    file.write_text(found.replace(weights_sha256="0" * 64).to_json(indent=2))
    trained(tmp_path)
    assert read_record(tmp_path / "backbone") == record


def test_presets_alone_are_kept(tmp_path: Path) -> None:
    trained(tmp_path)
    record, file = read_record(tmp_path / "backbone"), tmp_path / "backbone" / "backbone.json"
    found = record.replace(presets={"fast": {"purifier": "one-step", "level": 0.4}})
    file.write_text(found.to_json(indent=2))
    trained(tmp_path)
    assert read_record(tmp_path / "backbone") == found
    file.write_text(record.to_json(indent=2))
    trained(tmp_path, record=lambda _: {"name": "mine", "presets": found.presets})
    assert read_record(tmp_path / "backbone").presets == found.presets, "those of now where there were none"


def test_a_folder_is_for_one_training_at_a_time(tmp_path: Path) -> None:
    """A second training is refused and changes nothing; the first one releases the folder, after an error too."""
    second: list[str] = []

    def meanwhile(_: TrainState) -> None:
        with pytest.raises(CheckpointError, match="Another training is writing to") as refused:
            trained(tmp_path)
        second.append(str(refused.value))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, on_step=meanwhile)
    assert len(second) == 1
    assert names(tmp_path) == []
    assert trained(tmp_path).finished


def test_a_training_that_stops_has_a_backbone_as_it_is_then(tmp_path: Path) -> None:
    """By a clock that ticks with every reading, one after each step."""

    def ticking() -> Any:
        return countdown(1.0, iter(range(0, 10**6, 20)).__next__)

    config = BRIEF.replace(images=40)
    stopped = trained(tmp_path, config=config, seconds_left=ticking())
    assert (stopped.images_seen, stopped.finished) == (24, False)
    assert names(tmp_path) == ["backbone", "checkpoint-00000002", "checkpoint-00000003", "log.jsonl"]
    assert read_record(tmp_path / "backbone").training["images_seen"] == 24
    assert_same(load_backbone(tmp_path / "backbone"), stopped.model)
    done = trained(tmp_path, config=config, seconds_left=ticking())
    assert (done.images_seen, done.finished) == (40, True)
    assert_same(done.model, trained(tmp_path.with_name(tmp_path.name + "-straight"), config=config).model)


AUTO = BRIEF.replace(images=8, precision="auto")


@pytest.mark.parametrize(
    ("native", "plan", "precision"),
    [
        (True, None, "bfloat16"),
        (False, None, "float32"),
        (False, '{"settings": {"train": {"precision": "bfloat16"}}}', "bfloat16"),
        (False, "{", "float32"),
        (False, "[]", "float32"),
        (False, '{"settings": {"train": {"precision": "float8"}}}', "float32"),
    ],
)
def test_auto_is_the_precision_of_the_plan_or_what_the_device_multiplies_natively(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: bool, plan: str | None, precision: str
) -> None:
    """A continued training keeps the precision of its checkpoint, on any device."""
    monkeypatch.setattr("cmap_defense.training.plan.multiplies_bfloat16", lambda device: native)
    if plan is not None:
        (tmp_path / PLAN_FILE).write_text(plan)
    assert trained(tmp_path, config=AUTO).config == AUTO.replace(precision=precision)
    assert read_record(tmp_path / "backbone").training["train"]["precision"] == precision
    monkeypatch.setattr("cmap_defense.training.plan.multiplies_bfloat16", lambda device: not native)
    assert trained(tmp_path, config=AUTO).config.precision == precision


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a denoiser that a training starts from."""
    folder = tmp_path_factory.mktemp("denoiser")
    trained(folder, objective=EDM(), config=BRIEF.replace(images=8))
    return folder / "backbone"


def test_a_training_starts_from_the_weights_of_another(denoiser: Path, tmp_path: Path) -> None:
    """At a learning rate of next to nothing it ends where it starts; the record names it."""
    start = load_backbone(denoiser)
    config = BRIEF.replace(learning_rate=1e-12, images=8)
    done = trained(tmp_path, config=config, start=start)
    assert isinstance(done.model, ConsistencyBackbone)
    for name, tensor in weights(start).items():
        torch.testing.assert_close(done.model.state_dict()[name], tensor, rtol=0, atol=1e-9)
    recorded = read_record(tmp_path / "backbone").training["from"]
    assert recorded == {
        "name": "tiny",
        "kind": "denoiser",
        "weights_sha256": read_record(denoiser).weights_sha256,
        "training": read_record(denoiser).training,
    }
    assert recorded["training"]["command"] == "--images 8"
    with pytest.raises(CheckpointError, match=r"from: tiny before, not given now"):
        trained(tmp_path, config=config)


@pytest.mark.parametrize(("name", "changes"), [("compact", {"dropout": 0.3}), ("imagenet64", {})])
def test_a_start_may_differ_in_dropout_and_may_be_a_unet_of_the_library(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    network = Network.named(name, (1, 8, 8), TINY[name])
    write_backbone(ConsistencyBackbone(network.build(), (1, 8, 8)), tmp_path, name="start")
    start = load_backbone(tmp_path)
    model = module._fresh_model(Network.named(name, (1, 8, 8), TINY[name] | changes), ECT(), BRIEF, start)
    assert_same(model, start)
    assert [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)][:1] == (
        [0.3] if changes else [layer.p for layer in start.modules() if isinstance(layer, torch.nn.Dropout)][:1]
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("compact", {"channels": [8, 12]}, r"channels: \[8, 8\] before, \[8, 12\] now"),
        ("compact", {"head_channels": 8}, "head_channels: 4 before, 8 now"),
        ("ncsnpp", {}, "network: CompactUNet before, NCSNpp now"),
        ("imagenet64", {}, "network: CompactUNet before, DiffusersUNet now"),
    ],
)
def test_weights_of_another_network_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        refuse_other_network(Network.named(name, (1, 8, 8), TINY[name] | changes).build("meta"), NETWORK.build())


@pytest.mark.slow
def test_a_compiled_training_is_the_same_up_to_rounding(tmp_path: Path) -> None:
    """Its target too."""
    compiled = trained(tmp_path / "compiled", objective=CT(), config=BRIEF.replace(compile=True))
    plain = trained(tmp_path / "plain", objective=CT())
    latents = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(compiled.model.generate(latents), plain.model.generate(latents), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "compact"}, "train_backbone takes network as an object such as Network.named"),
        ({"objective": ECT}, "train_backbone takes objective as an object such as ECT()"),
        ({"config": {"images": 8}}, "train_backbone takes config as an object such as TrainingConfig"),
        ({"start": "fashion-mnist-ct"}, "train_backbone takes start as an object such as load_backbone"),
    ],
)
def test_arguments_of_another_kind_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}"):
        trained(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_a_text_too_and_may_begin_at_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    trained("~/made")  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "made" / "backbone" / "backbone.json").is_file()
    again = load_backbone("~/made/backbone")
    write_backbone(again, "~/copy", name="copy")
    assert read_record("~/copy").name == read_record(tmp_path / "copy").name == "copy"


def test_images_of_another_library_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be a tensor, but are ndarray: torch\.from_numpy"):
        train_backbone(training_images().numpy(), tmp_path, network=NETWORK, objective=ECT(), config=BRIEF)
