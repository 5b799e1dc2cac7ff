"""Whole trainings: what is written beside the checkpoints, where the first weights come from, what the record says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmap_defense import load_backbone
from cmap_defense.backbones import ConsistencyBackbone, EDMDenoiser
from cmap_defense.backbones.folder import read_record, write_backbone
from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.errors import CheckpointError, SettingsError
from cmap_defense.files import LOCK_FILE
from cmap_defense.training.budget import Budget
from cmap_defense.training.learner import Learner
from cmap_defense.training.loop import TrainState
from cmap_defense.training.networks import Network
from cmap_defense.training.objectives import CT, ECT, EDM
from cmap_defense.training.run import TrainedBackbone, train_backbone
from cmap_defense.training.settings import Execution, TrainSettings
from cmap_defense.training.start import load_weights, source_of
from training.clock import Clock
from training.killed import SETTINGS, training_images, training_labels
from training.test_networks import TINY

NETWORK = Network.named("compact", (1, 8, 8), TINY["compact"])
BRIEF = SETTINGS.replace(images=40, checkpoint_every=16)
"""5 steps, checkpoints after 2, 4 and 5."""


def described(settings: TrainSettings) -> dict[str, Any]:
    return {"name": "tiny", "licence": "CC0", "training": {"command": f"--images {settings.images}"}}


def trained(folder: Path, **options: Any) -> TrainedBackbone:
    given: dict[str, Any] = {"network": NETWORK, "objective": ECT(), "settings": BRIEF, "described": described}
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
    assert names(tmp_path) == ["backbone", "checkpoint-00000004", "checkpoint-00000005", "log.jsonl"]
    assert (done.images_seen, done.finished, done.settings) == (40, True, BRIEF)
    assert not done.model.training
    assert_same(load_backbone(tmp_path / "backbone"), done.model)
    assert len(sheets) == 3 + 1
    assert all(sheet.shape == (64, 1, 8, 8) for sheet in sheets)
    record = read_record(tmp_path / "backbone")
    assert (record.name, record.licence, record.kind, record.num_classes) == ("tiny", "CC0", "consistency", None)
    assert record.training == {
        "command": "--images 40",
        "train": BRIEF.to_dict(),
        "objective": {"name": "ect", **ECT().settings.to_dict()},
        "images": 50,
        "images_seen": 40,
    }


def test_a_denoiser_is_written_as_one(tmp_path: Path) -> None:
    sheets: list[Tensor] = []
    done = trained(tmp_path, objective=EDM(), on_samples=sheets.append)
    assert isinstance(done.model, EDMDenoiser)
    assert_same(load_backbone(tmp_path / "backbone"), done.model)
    assert sheets[0].shape == (64, 1, 8, 8)
    assert read_record(tmp_path / "backbone").kind == "denoiser"


def test_every_half_life_has_its_folder_at_the_end(tmp_path: Path) -> None:
    """The first one's is the backbone, and the same as without the others."""
    settings = BRIEF.replace(ema_half_lives=(50, 9, 3))
    done = trained(tmp_path / "three", settings=settings)
    assert [name for name in names(tmp_path / "three") if "backbone" in name] == [
        "backbone",
        "backbone-3",
        "backbone-9",
    ]
    assert_same(load_backbone(tmp_path / "three" / "backbone"), done.model)
    trained(tmp_path / "one")
    trained(tmp_path / "other", settings=BRIEF.replace(ema_half_lives=(9,)))
    for folder, expected in (("backbone", "one"), ("backbone-9", "other")):
        assert_same(load_backbone(tmp_path / "three" / folder), load_backbone(tmp_path / expected / "backbone"))
    assert read_record(tmp_path / "three" / "backbone-3").training["images_seen"] == 40


def test_a_class_conditional_training_is_recorded_as_one(tmp_path: Path) -> None:
    network = Network.named("compact", (1, 8, 8), TINY["compact"], num_classes=2)
    done = trained(tmp_path, network=network, labels=training_labels(), on_samples=lambda sheet: None)
    backbone = load_backbone(tmp_path / "backbone")
    assert backbone.num_classes == 2
    assert_same(backbone, done.model)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert backbone.generate(latents, torch.tensor([0, 1])).shape == latents.shape
    with pytest.raises(CheckpointError, match=r"data\.sha256"):
        trained(tmp_path, network=network, labels=1 - training_labels())


@pytest.mark.parametrize("name", ["ncsnpp", "imagenet64"])
def test_the_published_networks_can_be_trained(tmp_path: Path, name: str) -> None:
    """Small ones of them, a class-conditional one where there is such."""
    classes = 2 if name == "imagenet64" else None
    network = Network.named(name, (1, 8, 8), TINY[name], num_classes=classes)
    labels = None if classes is None else training_labels()
    done = trained(tmp_path, network=network, labels=labels, objective=CT(), settings=BRIEF.replace(images=16))
    found = load_backbone(tmp_path / "backbone")
    assert_same(found, done.model)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    told = () if classes is None else (torch.tensor([0, 1]),)
    assert found.generate(latents, *told).shape == latents.shape


def test_what_was_found_out_about_a_backbone_outlives_the_same_command(tmp_path: Path) -> None:
    """Figures and settings in its record, as long as its weights are the same."""
    trained(tmp_path)
    record, file = read_record(tmp_path / "backbone"), tmp_path / "backbone" / "backbone.json"
    found = record.replace(figures={"measured": {"accuracy": 0.5}}, settings={"n_latents": 3})
    file.write_text(found.to_json(indent=2))
    trained(tmp_path)
    assert read_record(tmp_path / "backbone") == found
    file.write_text(found.replace(weights_sha256="0" * 64).to_json(indent=2))
    trained(tmp_path)
    assert read_record(tmp_path / "backbone") == record


def test_the_length_of_a_plan_holds_without_a_budget(tmp_path: Path) -> None:
    """The same call without its minutes goes on to the end of the plan, not to that of the default length."""
    assert trained(tmp_path, plan=True, budget=None, settings=BRIEF).settings == BRIEF
    again = trained(tmp_path, plan=True, budget=None, settings=BRIEF.replace(images=10**6))
    assert (again.settings, again.images_seen, again.finished) == (BRIEF, 40, True)


def test_a_folder_is_for_one_training_at_a_time(tmp_path: Path) -> None:
    """What one training has begun, another leaves alone; and whoever ends, by an error too, lets go of it."""
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


def test_a_folder_that_another_process_has_is_refused_until_it_is_gone(tmp_path: Path) -> None:
    hold = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="Another training is writing to"):
            trained(tmp_path)
        other.kill()
    assert trained(tmp_path).finished


# --- a budget ---------------------------------------------------------------------------------------------------------


def ticking(seconds: float) -> Budget:
    """A minute, of a clock that is looked at after each step."""
    return Budget(1.0, clock=iter(float(n) * seconds for n in range(10**6)).__next__)


def test_a_training_that_stops_has_a_backbone_as_it_is_then(tmp_path: Path) -> None:
    stopped = trained(tmp_path, budget=ticking(20))
    assert (stopped.images_seen, stopped.finished) == (24, False)
    assert names(tmp_path) == ["backbone", "checkpoint-00000002", "checkpoint-00000003", "log.jsonl"]
    assert read_record(tmp_path / "backbone").training["images_seen"] == 24
    assert_same(load_backbone(tmp_path / "backbone"), stopped.model)
    done = trained(tmp_path, budget=ticking(20))
    assert (done.images_seen, done.finished) == (40, True)
    assert_same(done.model, trained(tmp_path.with_name(tmp_path.name + "-straight")).model)


def test_a_planned_training_says_its_length_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the plan, the settings and the record; and continues by it when it is called again. A step takes two
    seconds, and nothing else takes any time."""
    clock = Clock()
    monkeypatch.setattr(Learner, "step", clock.taking(2.0, Learner.step))
    done = trained(tmp_path, budget=Budget(1.0, clock), plan=True)
    images = 8 * int(0.95 * (60 - 2 * (3 + 5)) / 2)
    assert json.loads((tmp_path / "plan.json").read_text())["images"] == images
    assert done.settings == BRIEF.replace(images=images)
    assert done.finished
    record = read_record(tmp_path / "backbone")
    assert record.training["command"] == f"--images {images}"
    assert record.training["train"]["images"] == images
    before = clock.now
    again = trained(tmp_path, budget=Budget(9.0, clock), plan=True)
    assert (again.settings, again.finished, clock.now) == (done.settings, True, before)


# --- other weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a denoiser that a training starts from."""
    folder = tmp_path_factory.mktemp("denoiser")
    trained(folder, objective=EDM(), settings=BRIEF.replace(images=16))
    return folder / "backbone"


def test_a_training_starts_from_the_weights_of_another(denoiser: Path, tmp_path: Path) -> None:
    """At a learning rate of next to nothing it ends where it starts; the record names it."""
    start = load_backbone(denoiser)
    settings = BRIEF.replace(learning_rate=1e-12, images=8)
    sources = {"from": source_of(start)}
    done = trained(tmp_path, settings=settings, start=start, sources=sources)
    assert isinstance(done.model, ConsistencyBackbone)
    for name, tensor in weights(start).items():
        torch.testing.assert_close(done.model.state_dict()[name], tensor, rtol=0, atol=1e-9)
    said = read_record(tmp_path / "backbone").training["from"]
    assert said == {
        "name": "tiny",
        "kind": "denoiser",
        "weights_sha256": read_record(denoiser).weights_sha256,
        "training": read_record(denoiser).training,
    }
    assert said["training"]["command"] == "--images 16"
    with pytest.raises(CheckpointError, match=r"from: tiny before, not given now"):
        trained(tmp_path, settings=settings)


def test_the_noise_levels_of_the_first_weights_are_kept(tmp_path: Path) -> None:
    noise = NoiseRange(sigma_min=0.01, sigma_max=40.0, sigma_data=0.4)
    write_backbone(ConsistencyBackbone(NETWORK.build(), (1, 8, 8), noise), tmp_path / "start", name="other")
    trained(tmp_path / "run", settings=BRIEF.replace(images=8), start=load_backbone(tmp_path / "start"))
    assert load_backbone(tmp_path / "run" / "backbone").noise == noise
    assert "from" not in read_record(tmp_path / "run" / "backbone").training, "nothing is known of its training"


def test_dropout_alone_may_differ() -> None:
    start = ConsistencyBackbone(NETWORK.build(), (1, 8, 8))
    network = Network.named("compact", (1, 8, 8), TINY["compact"] | {"dropout": 0.3})
    model = ConsistencyBackbone(network.build(), (1, 8, 8))
    load_weights(model, start)
    assert_same(model, start)
    assert model.network.config.dropout == 0.3


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("compact", {"channels": [8, 12]}, r"channels: \[8, 8\] before, \[8, 12\] now"),
        ("compact", {"head_channels": 8}, "head_channels: 4 before, 8 now"),
        ("ncsnpp", {}, "network: CompactUNet before, NCSNpp now"),
        ("imagenet64", {}, "network: CompactUNet before, DiffusersUNet now"),
    ],
)
def test_weights_of_another_network_are_refused(name: str, changes: dict[str, Any], said: str) -> None:
    start = ConsistencyBackbone(NETWORK.build(), (1, 8, 8))
    model = ConsistencyBackbone(Network.named(name, (1, 8, 8), TINY[name] | changes).build(), (1, 8, 8))
    with pytest.raises(SettingsError, match=said):
        load_weights(model, start)


def test_weights_of_a_unet_of_the_library_are_taken(tmp_path: Path) -> None:
    network = Network.named("imagenet64", (1, 8, 8), TINY["imagenet64"])
    write_backbone(ConsistencyBackbone(network.build(), (1, 8, 8)), tmp_path, name="unet")
    start = load_backbone(tmp_path)
    model = ConsistencyBackbone(network.build(), (1, 8, 8))
    load_weights(model, start)
    assert_same(model, start)


@pytest.mark.slow
def test_a_compiled_training_is_the_same_up_to_rounding(tmp_path: Path) -> None:
    """Its target too."""
    compiled = trained(tmp_path / "compiled", objective=CT(), execution=Execution(compile=True))
    plain = trained(tmp_path / "plain", objective=CT())
    latents = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(compiled.model.generate(latents), plain.model.generate(latents), rtol=0, atol=1e-4)
