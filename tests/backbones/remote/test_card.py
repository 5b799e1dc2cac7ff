"""Model cards: what stands on them, for every name and for a repository."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.registry import HubRepository, OfficialFile, RegistryEntry, backbone_names, registry_entry
from cmap_defense.backbones.remote.card import entry_card, hub_card
from tiny import CONFIG, tiny_entry, tiny_file

COMMIT, SHA256 = "0123456789" * 4, "0123456789abcdef" * 4
ENTRIES = [registry_entry(name) for name in backbone_names()]
RECORD = BackboneRecord(
    name="tiny",
    description="A tiny model.",
    network="ncsnpp",
    network_config=CONFIG.to_dict(),
    noise={"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
    image_shape=CONFIG.image_shape,
    weights_sha256=SHA256,
    settings={"n_latents": 4, "eps": 1.6e-4},
    source={"url": "https://example.org/checkpoint", "size": 3},
    training={"command": "cmap-defense train", "data": {"name": "noise", "images": 32}},
    figures={"fid_one_step": 3.5, "seeds": [1, 2]},
    licence="Apache-2.0",
    paper="arXiv 2303.01469",
)


def rows(card: str) -> dict[str, str]:
    """The table's rows."""
    cells = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("| ")]
    return {cell[0].strip(): cell[1].strip() for cell in cells if len(cell) == 2}


def head_of(card: str) -> dict[str, Any]:
    """The metadata that the Hub reads."""
    before, head, _ = card.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(head)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_page_of_a_name_says_what_it_is_and_where_it_comes_from(entry: RegistryEntry):
    card = entry_card(entry)
    assert card.startswith(f"# {entry.name}\n")
    assert card.endswith("\n")
    assert "\n\n\n" not in card
    for text in (entry.description, entry.notes):
        assert text in card
    table = rows(card)
    assert table["licence of the weights"] == entry.licence
    assert table["paper"] == entry.paper
    assert table["kind"] == ("denoiser" if entry.kind == "denoiser" else "consistency model")
    assert table["images"].startswith(" x ".join(map(str, entry.image_shape)))
    for source in entry.sources:
        if isinstance(source, OfficialFile):
            assert source.url in card
        if isinstance(source, HubRepository):
            assert f"https://huggingface.co/{source.repo_id}" in card
            assert (source.revision or "no commit pinned") in card


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_page_of_a_name_shows_verification_use_settings_and_figures(entry: RegistryEntry):
    card = entry_card(entry)
    assert rows(card)["verified"].startswith("yes" if entry.verified else "**no**")
    assert ("**not verified**" in card) == (not entry.verified)
    use = f'load_backbone("{entry.name}")' if entry.kind == "denoiser" else f'backbone="{entry.name}"'
    assert use in card
    assert ("class_labels" in card) == (entry.num_classes is not None)
    for name, value in entry.settings.items():
        assert f"`{name} = {value:g}`" in card
    assert ("No figure is measured or cited here." in card) == (not entry.quality)
    for name in entry.quality:
        assert f"- {name.replace('_', ' ')}:" in card


def test_what_is_verified_is_shown():
    known = HubRepository(repo_id="someone/model", revision=COMMIT, sha256=SHA256)
    card = entry_card(tiny_entry("mine", known, tiny_file("https://example.org/f", size=1234567, sha256=SHA256)))
    assert COMMIT in card
    assert card.count(SHA256) == 2
    assert "1,234,567 bytes" in card
    assert "not verified" not in card


def test_card_of_a_repository_shows_the_record():
    card = hub_card(RECORD, "someone/tiny")
    assert "# tiny\n\nA tiny model.\n" in card
    table = rows(card)
    assert table["images"] == "3 x 8 x 8, unconditional"
    assert table["licence of the weights"] == "Apache-2.0"
    assert table["paper"] == "arXiv 2303.01469"
    assert table["network"] == "ncsnpp"
    assert table["SHA-256"] == f"`{SHA256}`"
    assert 'backbone="someone/tiny"' in card
    for line in (
        "- url: https://example.org/checkpoint",
        "- size: 3",
        "- command: cmap-defense train",
        "- data:\n    - name: noise\n    - images: 32",
        "- fid one step: 3.5",
        "- seeds: 1, 2",
        "`n_latents = 4`, `eps = 0.00016`",
    ):
        assert line in card


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("MIT", {"license": "mit"}),
        ("", {}),
        (
            "Apache-2.0 (repository); research: only",
            {"license": "other", "license_name": "apache-2.0-repository-research-only"},
        ),
        ('"quoted" \\ and: {odd}', {"license": "other", "license_name": "quoted-and-odd"}),
    ],
)
def test_head_of_the_card_is_yaml_and_names_the_licence(licence: str, expected: dict[str, str]):
    head = head_of(hub_card(RECORD.replace(licence=licence), "someone/tiny"))
    assert {name: value for name, value in head.items() if name.startswith("license")} == expected
    assert head["library_name"] == "cmap-defense"
    assert head["pipeline_tag"] == "unconditional-image-generation"
    assert "consistency-model" in head["tags"]


def test_class_conditional_model_is_not_called_unconditional():
    card = hub_card(RECORD.replace(num_classes=10), "someone/tiny")
    assert "pipeline_tag" not in head_of(card)
    assert rows(card)["images"] == "3 x 8 x 8, class-conditional, 10 classes"


def test_denoiser_is_shown_as_one():
    card = hub_card(RECORD.replace(kind="denoiser"), "someone/tiny")
    assert "denoiser" in head_of(card)["tags"]
    assert 'load_backbone("someone/tiny")' in card
    assert "PurifiedClassifier" not in card
    assert "## Settings" not in card


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_licence_of_the_catalogue_makes_a_head_that_parses(entry: RegistryEntry):
    head = head_of(hub_card(RECORD.replace(licence=entry.licence), "someone/tiny"))
    assert head["license"]
