"""Model cards of repositories: what stands on them."""

from typing import Any

import pytest
import yaml

from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.registry import RegistryEntry, backbone_names, registry_entry
from cmap_defense.backbones.remote.card import hub_card
from tiny import CONFIG

SHA256 = "0123456789abcdef" * 4
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


def test_card_of_a_repository_shows_the_record():
    card = hub_card(RECORD, "someone/tiny")
    assert "# tiny\n\nA tiny model.\n" in card
    table = rows(card)
    assert table["images"] == "3 x 8 x 8, unconditional"
    assert table["licence of the weights"] == "Apache-2.0"
    assert table["paper"] == "arXiv 2303.01469"
    assert table["network"] == "ncsnpp"
    assert table["SHA-256"] == f"`{SHA256}`"
    assert '"someone/tiny"' in card
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
