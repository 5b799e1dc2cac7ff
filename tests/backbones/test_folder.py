"""Backbone folders: what is written is read, and every kind of damage has an error that names the file."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmap_defense import load_backbone
from cmap_defense.backbones.folder import RECORD_FILE, read_backbone, read_record, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, NoiseRange
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import BackboneFileError, CmapError, SettingsError
from tiny import randomised
from toys import ToyBackbone, noise

WEIGHTS_FILE = "weights.safetensors"
CONFIG = CompactUNetConfig(
    image_shape=(3, 8, 4), channels=(4, 8), blocks=1, attention=(False, True), head_channels=4, embedding=8
)
NOISE = NoiseRange(sigma_min=0.01, sigma_max=40.0, sigma_data=0.25)


def small_backbone(seed: int = 1) -> ConsistencyBackbone:
    """A backbone with weights away from zero."""
    with torch.random.fork_rng(devices=[]):
        return ConsistencyBackbone(randomised(CompactUNet(CONFIG), seed).train(), CONFIG.image_shape, NOISE)


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


def test_read_backbone_is_ready_for_use(folder: Path):
    backbone = read_backbone(folder)
    assert backbone.image_shape == CONFIG.image_shape
    assert backbone.noise == NOISE
    assert backbone.network.config == CONFIG
    assert not backbone.training
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert {t.device.type for t in backbone.state_dict().values()} == {"cpu"}


def test_record_is_returned_read_and_plain_json(tmp_path: Path):
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
    assert read_record(str(tmp_path)) == BackboneRecord.from_json(record.to_json()) == record
    assert {name: getattr(record, name) for name in described} == described
    assert record.weights_sha256 == hashlib.sha256((tmp_path / WEIGHTS_FILE).read_bytes()).hexdigest()
    values = json.loads((tmp_path / RECORD_FILE).read_text(encoding="utf-8"))
    assert (values["format"], values["network"]) == (1, "compact-unet")
    assert values["image_shape"] == list(CONFIG.image_shape)
    assert values["network_config"] == CONFIG.to_dict()
    assert {path.name for path in tmp_path.iterdir()} == {RECORD_FILE, WEIGHTS_FILE}
    backbone = read_backbone(str(tmp_path))
    assert backbone.record == record
    assert backbone.default_settings == {"n_latents": 3}


def test_writing_again_replaces_the_backbone(folder: Path):
    write_backbone(small_backbone(seed=2), folder, name="another")
    expected = small_backbone(seed=2).network.state_dict()
    backbone = read_backbone(folder)
    assert backbone.record is not None
    assert backbone.record.name == "another"
    assert all(torch.equal(t, expected[name]) for name, t in backbone.network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16])
def test_weights_are_cast_from_the_precision_of_the_file(tmp_path: Path, file_dtype: torch.dtype, dtype: torch.dtype):
    record = write_backbone(small_backbone(), tmp_path, dtype=file_dtype, name="toy")
    assert record.weights_dtype == str(file_dtype).removeprefix("torch.")
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_FILE).values()} == {file_dtype}
    backbone = read_backbone(tmp_path, dtype=dtype)
    expected = small_backbone().network.state_dict()
    for name, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, expected[name].to(file_dtype).to(dtype))
    images = backbone.generate(noise(2, *CONFIG.image_shape, seed=3))
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


def test_backbone_of_another_network_cannot_be_written(tmp_path: Path):
    unknown = ConsistencyBackbone(ToyBackbone(), (3, 8, 6))
    with pytest.raises(BackboneFileError, match="ToyBackbone"):
        write_backbone(unknown, tmp_path / "model", name="toy")
    assert not (tmp_path / "model").exists()


def test_failed_write_leaves_the_folder_as_it_was(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises((TypeError, SettingsError)):
        write_backbone(small_backbone(seed=2), folder, name="another", no_such_field=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def writing(file: str, content: str | bytes | None) -> Callable[[Path], None]:
    """Replace a file; None puts a folder there."""

    def damage(folder: Path) -> None:
        (folder / file).unlink()
        if content is None:
            (folder / file).mkdir()
        else:
            (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cutting(file: str, count: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:count])

    return damage


def editing(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_record(folder, **changes)


RECORD_DAMAGE = {
    "no record": lambda folder: (folder / RECORD_FILE).unlink(),
    "no folder": lambda folder: folder.rename(folder.with_name("moved")),
    "record is a folder": writing(RECORD_FILE, None),
    "not JSON": writing(RECORD_FILE, "name: toy"),
    "cut": cutting(RECORD_FILE, -20),
    "empty": writing(RECORD_FILE, ""),
    "binary": writing(RECORD_FILE, b"\xff\xfe\x00\x80"),
    "a list": writing(RECORD_FILE, "[1, 2]"),
}
WRONG_CONFIGS: list[dict[str, Any]] = [{"depth": 3}, {"blocks": 0}, {"channels": [4, 11], "head_channels": 4}]
EDITED: dict[str, list[Any]] = {
    "colour": ["red"],
    "name": [None, 3],
    "network": [None, "compact-net"],
    "weights_sha256": [None],
    "format": [2],
    "image_shape": [[8, 4], "3x8x4", [3, 0, 4], [3, 8, 8], [1, 8, 4]],
    "value_range": [[0, 1]],
    "noise": [{"sigma_min": "small"}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"sigma": 2.0}, [1, 2]],
    "network_config": [[1, 2], *(CONFIG.to_dict() | wrong for wrong in WRONG_CONFIGS)],
    "settings": [[1, 2]],
    "weights_file": ["", ".", "..", *(f"{place}{WEIGHTS_FILE}" for place in ("../", "/etc/", "..\\", "a\n/../../"))],
}
RECORD_DAMAGE |= {f"{name} {value}": editing(**{name: value}) for name, values in EDITED.items() for value in values}


def weights_are_pickled(folder: Path) -> None:
    torch.save(small_backbone().network.state_dict(), folder / WEIGHTS_FILE)


def one_bit_flipped(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Other weights, with a record that has their checksum."""

    def damage(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        save_file(change(load_file(path)), path)
        edit_record(folder, weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest())

    return damage


PAGE = "<!doctype html><html><body>Not found</body></html>" * 10
WEIGHTS_DAMAGE = {
    "missing": ("is missing", lambda folder: (folder / WEIGHTS_FILE).unlink()),
    "a folder": ("is missing", writing(WEIGHTS_FILE, None)),
    "empty": ("not a whole safetensors file", writing(WEIGHTS_FILE, "")),
    "cut in the header": ("not a whole safetensors file", cutting(WEIGHTS_FILE, 20)),
    "cut in the numbers": ("not a whole safetensors file", cutting(WEIGHTS_FILE, -10)),
    "a pickle": ("not a whole safetensors file", weights_are_pickled),
    "a web page": ("it is a web page", writing(WEIGHTS_FILE, PAGE)),
    "one bit flipped": ("SHA-256", one_bit_flipped),
    "wrong checksum": ("0" * 64, editing(weights_sha256="0" * 64)),
    "other tensors": ("'down.0", tensors(lambda _: {"model.diffusion_model.weight": torch.zeros(2, 3)})),
    "a tensor less": ("'leave.bias'", tensors(lambda t: {k: v for k, v in t.items() if k != "leave.bias"})),
    "a tensor more": ("'ema.weight'", tensors(lambda t: t | {"ema.weight": torch.zeros(2)})),
    "another shape": ("'leave.bias'", tensors(lambda t: t | {"leave.bias": torch.zeros(5)})),
    "no tensors": ("tensor(s) are missing", tensors(lambda _: {})),
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


@pytest.mark.parametrize(("words", "damage"), WEIGHTS_DAMAGE.values(), ids=WEIGHTS_DAMAGE.keys())
def test_damaged_weights_are_refused_by_their_name(folder: Path, words: str, damage: Callable[[Path], None]):
    checksum = read_record(folder).weights_sha256
    damage(folder)
    message = check_refused(folder, WEIGHTS_FILE)
    assert words in message
    assert "SHA-256" not in words or checksum in message


def test_unknown_network_names_the_near_match(folder: Path):
    edit_record(folder, network="compact-net")
    with pytest.raises(BackboneFileError, match=r"'compact-net'.*'compact-unet'"):
        read_backbone(folder)


def test_weights_outside_the_folder_are_not_opened(folder: Path):
    """The file outside is whole and has the right checksum: only its place is wrong."""
    (folder / WEIGHTS_FILE).rename(folder.parent / WEIGHTS_FILE)
    edit_record(folder, weights_file=f"../{WEIGHTS_FILE}")
    assert "weights_file" in check_refused(folder, RECORD_FILE)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dtype": torch.int8}, SettingsError, "must be a floating-point torch.dtype"),
        ({"dtype": torch.complex64}, SettingsError, "must be a floating-point torch.dtype"),
        ({"dtype": "float16"}, SettingsError, "must be a floating-point torch.dtype"),
        ({"name": None}, SettingsError, "with a name for its record"),
        ({"backbone": torch.nn.Flatten()}, BackboneFileError, "but this is a Flatten"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    changes: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"backbone": load_backbone("fashion-mnist-edm"), "name": "a"} | changes
    if given["name"] is None:
        del given["name"]
    with pytest.raises(kind, match=message):
        write_backbone(given.pop("backbone"), tmp_path / "made", **given)
    assert not (tmp_path / "made").exists()
