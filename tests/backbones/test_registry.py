"""Backbones by name: which there are, what is known of each, and names of one's own."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cmap_defense import CMAPSettings
from cmap_defense.backbones.registry import (
    HubRepository,
    LocalFolder,
    OfficialFile,
    RegistryEntry,
    backbone_names,
    register,
    registry_entry,
)
from cmap_defense.errors import SettingsError, UnknownNameError
from tiny import own_names, tiny_entry, tiny_file

EMBEDDED = ("fashion-mnist-ct", "cifar10-ct-small", "fashion-mnist-edm", "cifar10-edm-small")
NAMES = backbone_names()
FILE, REPOSITORY = tiny_file("https://example.org/checkpoint"), HubRepository(repo_id="someone/model")
COMMIT, SHA256 = "0123456789" * 4, "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers is unknown to the next."""
    with own_names():
        yield


def test_names_are_sorted_and_each_has_an_entry_of_that_name():
    names = backbone_names()
    assert names == sorted(names)
    assert [registry_entry(name).name for name in names] == names


@pytest.mark.parametrize("name", EMBEDDED)
def test_packaged_models_lie_in_folders_that_are_called_like_them(name: str):
    (source,) = registry_entry(name).sources
    assert isinstance(source, LocalFolder)
    assert source.folder.name == name
    assert source.verified


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_complete_and_json(name: str):
    entry = registry_entry(name)
    assert entry.description
    assert "\n" not in entry.description
    assert entry.licence
    assert entry.paper
    assert not entry.quality or "cited from" in entry.quality or name in EMBEDDED
    values = json.loads(json.dumps(entry.to_dict(), allow_nan=False))
    assert (values["name"], values["verified"]) == (name, entry.verified)
    assert values["image_shape"] == list(entry.image_shape)
    assert [source["type"] for source in values["sources"]] == [type(source).__name__ for source in entry.sources]
    for source in entry.sources:
        assert source.address in str(values)


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_entries_are_valid_and_of_published_models_the_released_ones(name: str):
    settings = CMAPSettings().replace(**registry_entry(name).settings)
    if name.startswith("imagenet"):
        assert settings == CMAPSettings.preset("imagenet100")
    if isinstance(registry_entry(name).sources[-1], OfficialFile) and name != "cifar10-edm":
        assert settings == CMAPSettings.preset("cifar10")


CITED = {
    1: {"cifar10-cd": 3.55, "cifar10-ct": 8.70},
    2: {"imagenet64-cd-lpips": 6.20, "bedroom256-cd-lpips": 7.80, "cat256-cd-lpips": 11.0}
    | {"imagenet64-ct": 13.0, "bedroom256-ct": 16.0, "cat256-ct": 20.7},
}


@pytest.mark.parametrize(
    ("name", "fid", "table"), [(name, fid, table) for table, figures in CITED.items() for name, fid in figures.items()]
)
def test_cited_figures_are_those_of_the_paper(name: str, fid: float, table: int):
    quality = registry_entry(name).quality
    assert quality["FID of one-step samples"] == fid
    assert quality["cited from"] == f"arXiv 2303.01469, table {table}"


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion_mnist_ct", "Fashion-MNIST-ct", "fashion-mnist-ctt"])
def test_unknown_name_lists_the_near_match(name: str):
    with pytest.raises(UnknownNameError, match="fashion-mnist-ct") as caught:
        registry_entry(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "9"])
def test_names_hold_letters_digits_and_a_few_signs(name: str):
    assert tiny_entry(name, FILE).name == name


WRONG = {
    "name": ["", "-a", ".a", "a b", "a/b", "a@b", "é", "a\n", None, 3],
    "sources": [(), ("someone/model",), (FILE, None)],
    "image_shape": [(3, 8), (3, 8, 0), (3, 8, 8.0)],
    "num_classes": [0, 2.5],
    "kind": ["flow", None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_field_that_is_wrong_is_named(field: str, value: object):
    fields: dict[str, Any] = {"name": "mine", "description": "", "sources": (FILE,), "image_shape": (3, 8, 8)}
    RegistryEntry(**fields)
    with pytest.raises(SettingsError, match=f"RegistryEntry.{field}"):
        RegistryEntry(**(fields | {field: value}))


def test_entry_has_its_sources_and_settings_to_itself():
    settings = {"n_latents": 2}
    entry = tiny_entry("mine", FILE, settings=settings)
    settings["n_latents"] = 3
    assert entry.settings == {"n_latents": 2}
    cat, bedroom = registry_entry("cat256-cd"), registry_entry("bedroom256-cd")
    assert cat.settings is not bedroom.settings
    made: Any = (source for source in (FILE,))
    assert dataclasses.replace(entry, sources=made).sources == (FILE,)


@pytest.mark.parametrize(
    ("source", "field", "values"),
    [
        (HubRepository, "repo_id", ["model", "a/b/c", "a b/c", "/c", "a/", "", "a/b@main"]),
        (HubRepository, "revision", ["main", "", COMMIT[:-1], COMMIT + "0", COMMIT.replace("0", "G"), COMMIT + "\n"]),
        (HubRepository, "sha256", ["", SHA256[:-1], SHA256.upper(), SHA256 + "\n"]),
        (OfficialFile, "url", ["", "example.org/file", "ftp://example.org/file", "file:///etc/passwd", "/etc/passwd"]),
        (OfficialFile, "size", [0, -1, 2.5, "3", True]),
        (OfficialFile, "sha256", ["", SHA256[:-1], "x" * 64]),
    ],
)
def test_field_of_a_source_that_is_wrong_is_named(source: type, field: str, values: list[object]):
    right: dict[str, Any] = {"repo_id": "someone/model"} if source is HubRepository else {"url": "https://a.b/c"}
    source(**right)
    for value in values:
        with pytest.raises(SettingsError, match=rf"{source.__name__}\.{field}"):
            source(**(right | {field: value}))


def test_source_is_verified_when_all_is_known_that_can_be(tmp_path: Path):
    assert not REPOSITORY.verified
    assert not HubRepository(repo_id="someone/model", revision=COMMIT).verified
    assert not HubRepository(repo_id="someone/model", sha256=SHA256).verified
    assert HubRepository(repo_id="someone/model", revision=COMMIT, sha256=SHA256).verified
    assert not tiny_file("https://example.org/file", size=3).verified
    assert tiny_file("https://example.org/file", sha256=SHA256).verified
    assert not LocalFolder(folder=tmp_path).verified


def test_registered_name_is_found():
    entry = tiny_entry("mine", FILE)
    register(entry)
    assert registry_entry("mine") is entry
    assert backbone_names() == sorted([*NAMES, "mine"])


@pytest.mark.parametrize("name", ["mine", "cifar10-cd"])
def test_name_that_is_taken_is_refused_unless_it_is_to_be_replaced(name: str):
    register(tiny_entry(name, FILE), replace=True)
    with pytest.raises(SettingsError, match=rf"'{name}' already.*replace=True"):
        register(tiny_entry(name, REPOSITORY))
    assert registry_entry(name).sources == (FILE,)
    register(tiny_entry(name, REPOSITORY), replace=True)
    assert registry_entry(name).sources == (REPOSITORY,)
