"""Backbone folders: what is written is read, and every kind of damage has an error that names the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmap_defense.backbones.folder import RECORD_FILE, read_backbone, read_record, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, NoiseRange
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import BackboneFileError, CmapError, SettingsError
from toys import ToyBackbone, noise

WEIGHTS_FILE = "weights.safetensors"
CONFIG = CompactUNetConfig(
    image_shape=(3, 8, 4), channels=(4, 8), blocks=1, attention=(False, True), head_channels=4, embedding=8
)
NOISE = NoiseRange(sigma_min=0.01, sigma_max=40.0, sigma_data=0.25)


def small_backbone(seed: int = 1) -> ConsistencyBackbone:
    """A backbone with weights away from zero."""
    with torch.random.fork_rng(devices=[]):
        network = CompactUNet(CONFIG)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(0.3 * noise(*parameter.shape, seed=100 * seed + index))
    return ConsistencyBackbone(network, CONFIG.image_shape, NOISE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole backbone folder."""
    write_backbone(small_backbone(), tmp_path / "model", name="toy", settings={"n_latents": 3})
    return tmp_path / "model"


def edit_record(folder: Path, **changes: Any) -> None:
    """Change fields of the record as a hand would; None takes a field out."""
    path = folder / RECORD_FILE
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def replace_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other weights, with a record that has their checksum."""
    path = folder / WEIGHTS_FILE
    save_file(weights, path)
    edit_record(folder, weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


# ------------------------------------------------------------------------------------------------------- round trip


def test_written_backbone_is_read_to_the_bit(folder: Path):
    ours = small_backbone().to(memory_format=torch.channels_last)  # the layout in which folders are read
    theirs = read_backbone(folder)
    expected = ours.network.state_dict()
    assert theirs.network.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in theirs.network.state_dict().items())
    latents = noise(2, *CONFIG.image_shape, seed=3)
    assert torch.equal(theirs.generate(latents), ours.eval().generate(latents))


def test_read_backbone_is_ready_for_use(folder: Path):
    backbone = read_backbone(folder)
    assert backbone.image_shape == CONFIG.image_shape
    assert backbone.noise == NOISE
    assert backbone.network.config == CONFIG
    assert not backbone.training
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert {t.device.type for t in backbone.state_dict().values()} == {"cpu"}


def test_read_backbone_knows_its_record_and_settings(folder: Path):
    backbone = read_backbone(folder)
    assert backbone.record == read_record(folder)
    assert backbone.default_settings == {"n_latents": 3}


def test_write_returns_the_record_that_is_read(tmp_path: Path):
    described = {
        "name": "toy",
        "description": "two words",
        "settings": {"n_latents": 3},
        "training": {"steps": 5, "data": ["a", "b"]},
        "figures": {"fid": 1.5},
        "licence": "Apache-2.0",
        "paper": "arXiv 2412.08394",
    }
    record = write_backbone(small_backbone(), tmp_path, **described)
    assert read_record(tmp_path) == record
    assert {name: getattr(record, name) for name in described} == described


def test_record_holds_the_checksum_of_the_weights(folder: Path):
    checksum = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert read_record(folder).weights_sha256 == checksum


def test_record_is_plain_json_without_this_package(folder: Path):
    values = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    assert values["format"] == 1
    assert values["network"] == "compact-unet"
    assert values["image_shape"] == list(CONFIG.image_shape)
    assert values["network_config"] == CONFIG.to_dict()


def test_a_folder_holds_the_record_and_the_weights_and_nothing_else(folder: Path):
    assert {path.name for path in folder.iterdir()} == {RECORD_FILE, WEIGHTS_FILE}


def test_writing_makes_the_folders_on_the_way(tmp_path: Path):
    write_backbone(small_backbone(), tmp_path / "a" / "b", name="toy")
    assert read_record(tmp_path / "a" / "b").name == "toy"


def test_writing_again_replaces_the_backbone(folder: Path):
    write_backbone(small_backbone(seed=2), folder, name="another")
    expected = small_backbone(seed=2).network.state_dict()
    backbone = read_backbone(folder)
    assert backbone.record is not None
    assert backbone.record.name == "another"
    assert all(torch.equal(t, expected[name]) for name, t in backbone.network.state_dict().items())


def test_float16_file_holds_float16_and_reads_as_float32(tmp_path: Path):
    record = write_backbone(small_backbone(), tmp_path, dtype=torch.float16, name="toy")
    assert record.weights_dtype == "float16"
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float16}
    expected = small_backbone().network.state_dict()
    for name, tensor in read_backbone(tmp_path).network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float())


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16])
def test_load_in_bfloat16_casts_the_weights(tmp_path: Path, file_dtype: torch.dtype):
    write_backbone(small_backbone(), tmp_path, dtype=file_dtype, name="toy")
    backbone = read_backbone(tmp_path, dtype=torch.bfloat16)
    expected = small_backbone().network.state_dict()
    for name, tensor in backbone.network.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(file_dtype).float().bfloat16())
    images = backbone.generate(noise(2, *CONFIG.image_shape, seed=3))
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


def test_writing_leaves_the_backbone_as_it_was(tmp_path: Path):
    backbone = small_backbone().train()
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    write_backbone(backbone, tmp_path, dtype=torch.float16, name="toy")
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())


def test_backbone_of_another_network_cannot_be_written(tmp_path: Path):
    foreign = ConsistencyBackbone(ToyBackbone(), (3, 8, 6))
    with pytest.raises(BackboneFileError, match="ToyBackbone"):
        write_backbone(foreign, tmp_path / "model", name="toy")
    assert not (tmp_path / "model").exists()


def test_failed_write_leaves_the_folder_as_it_was(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises((TypeError, SettingsError)):
        write_backbone(small_backbone(seed=2), folder, name="another", no_such_field=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ------------------------------------------------------------------------------------------------------------ damage


def no_record(folder: Path) -> None:
    (folder / RECORD_FILE).unlink()


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def record_is_a_folder(folder: Path) -> None:
    (folder / RECORD_FILE).unlink()
    (folder / RECORD_FILE).mkdir()


def record_is_not_json(folder: Path) -> None:
    (folder / RECORD_FILE).write_text("name: toy")


def record_is_cut(folder: Path) -> None:
    path = folder / RECORD_FILE
    path.write_text(path.read_text()[:-20])


def record_is_empty(folder: Path) -> None:
    (folder / RECORD_FILE).write_text("")


def record_is_binary(folder: Path) -> None:
    (folder / RECORD_FILE).write_bytes(b"\xff\xfe\x00\x80")


def record_is_a_list(folder: Path) -> None:
    (folder / RECORD_FILE).write_text("[1, 2]")


def editing(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_record(folder, **changes)


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_record(folder, network_config=CONFIG.to_dict() | changes)


RECORD_DAMAGE = {
    "no record": no_record,
    "no folder": no_folder,
    "record is a folder": record_is_a_folder,
    "not JSON": record_is_not_json,
    "cut": record_is_cut,
    "empty": record_is_empty,
    "binary": record_is_binary,
    "a list": record_is_a_list,
    "unknown field": editing(colour="red"),
    "no name": editing(name=None),
    "no network": editing(network=None),
    "no checksum": editing(weights_sha256=None),
    "name is a number": editing(name=3),
    "later format": editing(format=2),
    "unknown network": editing(network="compact-net"),
    "image shape of two": editing(image_shape=[8, 4]),
    "image shape of text": editing(image_shape="3x8x4"),
    "image shape with 0": editing(image_shape=[3, 0, 4]),
    "image shape of another size than the network's": editing(image_shape=[3, 8, 8]),
    "image shape of other channels than the network's": editing(image_shape=[1, 8, 4]),
    "value range": editing(value_range=[0, 1]),
    "noise of text": editing(noise={"sigma_min": "small"}),
    "noise upside down": editing(noise={"sigma_min": 2.0, "sigma_max": 1.0}),
    "noise with an unknown field": editing(noise={"sigma": 2.0}),
    "noise is a list": editing(noise=[1, 2]),
    "config is a list": editing(network_config=[1, 2]),
    "config with an unknown field": with_config(depth=3),
    "config of nonsense": with_config(blocks=0),
    "config whose heads do not divide": with_config(channels=[4, 11], head_channels=4),
    "settings are a list": editing(settings=[1, 2]),
    "weights in the folder above": editing(weights_file="../weights.safetensors"),
    "weights anywhere": editing(weights_file="/etc/weights.safetensors"),
    "weights above, spelt for Windows": editing(weights_file="..\\weights.safetensors"),
    "weights are the folder": editing(weights_file="."),
    "weights are the folder above": editing(weights_file=".."),
    "weights without a name": editing(weights_file=""),
}


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def weights_are_a_folder(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()


def keep_bytes(count: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        path.write_bytes(path.read_bytes()[:count])

    return cut


def weights_are_pickled(folder: Path) -> None:
    torch.save(small_backbone().network.state_dict(), folder / WEIGHTS_FILE)


def weights_are_a_page(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_text("<!doctype html><html><body>Not found</body></html>" * 10)


def one_bit_flipped(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def wrong_checksum(folder: Path) -> None:
    edit_record(folder, weights_sha256="0" * 64)


def foreign_keys(folder: Path) -> None:
    replace_weights(folder, {"model.diffusion_model.weight": torch.zeros(2, 3)})


def one_key_missing(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    weights.pop("leave.bias")
    replace_weights(folder, weights)


def one_key_too_many(folder: Path) -> None:
    replace_weights(folder, load_file(folder / WEIGHTS_FILE) | {"ema.weight": torch.zeros(2)})


def one_shape_wrong(folder: Path) -> None:
    replace_weights(folder, load_file(folder / WEIGHTS_FILE) | {"leave.bias": torch.zeros(5)})


def no_tensors(folder: Path) -> None:
    replace_weights(folder, {})


WEIGHTS_DAMAGE = {
    "missing": no_weights,
    "a folder": weights_are_a_folder,
    "empty": keep_bytes(0),
    "cut in the header": keep_bytes(20),
    "cut in the numbers": keep_bytes(-10),
    "a pickle": weights_are_pickled,
    "a web page": weights_are_a_page,
    "one bit flipped": one_bit_flipped,
    "wrong checksum": wrong_checksum,
    "foreign keys": foreign_keys,
    "one key missing": one_key_missing,
    "one key too many": one_key_too_many,
    "one shape wrong": one_shape_wrong,
    "no tensors": no_tensors,
}


def check_refused(folder: Path, file: str) -> str:
    """The message of the error, which is of the right kinds and names the file and its folder."""
    with pytest.raises(BackboneFileError) as caught:
        read_backbone(folder)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, CmapError)
    message = str(caught.value)
    assert file in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("damage", RECORD_DAMAGE.values(), ids=RECORD_DAMAGE.keys())
def test_damaged_record_is_refused_by_its_name(folder: Path, damage: Callable[[Path], None]):
    damage(folder)
    check_refused(folder, RECORD_FILE)


@pytest.mark.parametrize("damage", WEIGHTS_DAMAGE.values(), ids=WEIGHTS_DAMAGE.keys())
def test_damaged_weights_are_refused_by_their_name(folder: Path, damage: Callable[[Path], None]):
    damage(folder)
    check_refused(folder, WEIGHTS_FILE)


def test_unknown_network_names_the_near_match(folder: Path):
    edit_record(folder, network="compact-net")
    with pytest.raises(BackboneFileError, match=r"'compact-net'.*'compact-unet'"):
        read_backbone(folder)


def test_foreign_weights_are_named_with_what_was_expected(folder: Path):
    one_shape_wrong(folder)
    assert "leave.bias" in check_refused(folder, WEIGHTS_FILE)


def test_wrong_checksum_shows_both(folder: Path):
    actual = read_record(folder).weights_sha256
    wrong_checksum(folder)
    message = check_refused(folder, WEIGHTS_FILE)
    assert actual in message
    assert "0" * 64 in message


def test_weights_outside_the_folder_are_not_opened(folder: Path):
    """The file outside is whole and has the right checksum: only its place is wrong."""
    (folder / WEIGHTS_FILE).rename(folder.parent / WEIGHTS_FILE)
    edit_record(folder, weights_file=f"../{WEIGHTS_FILE}")
    assert "weights_file" in check_refused(folder, RECORD_FILE)


def test_weights_may_have_another_name_beside_the_record(folder: Path):
    (folder / WEIGHTS_FILE).rename(folder / "ema.safetensors")
    edit_record(folder, weights_file="ema.safetensors")
    assert read_backbone(folder).image_shape == CONFIG.image_shape


@pytest.mark.parametrize("kind", [str, Path])
def test_folder_may_be_text_or_a_path(folder: Path, kind: type):
    assert read_backbone(kind(folder)).record == read_record(kind(folder))


def test_record_json_round_trip_is_exact(folder: Path):
    record = read_record(folder)
    assert BackboneRecord.from_json(record.to_json()) == record
