"""The paper's studies: what varies, what stays, and what is drawn of it."""

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import PGD, ConsistencyDisruption, NoiseAndDenoise, ThreatModel, Transfer
from cmap_defense.backbones.karras import NoiseRange, karras_levels
from cmap_defense.evaluation import Protocol
from cmap_defense.paper import STUDIES, make_study, run_study, study_markdown, write_study
from cmap_defense.plots.studies import study_plot
from toys import ToyBackbone, noise, uniform

THREAT = ThreatModel(eps=0.06)
ATTACKS = {
    "transfer": Transfer(PGD(THREAT, steps=1, step_size=0.02)),
    "pgd": PGD(ThreatModel(norm="linf", eps=0.06), steps=1),
}
PROTOCOL = Protocol(predictions=2, reevaluations=2, group=2, sanity_images=2)


class Linear(nn.Module):
    """Images [B, 3, 8, 6] to logits of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(3, 144, seed=5) / 12)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T


def toy() -> PurifiedClassifier:
    settings = CMAPSettings(n_latents=2, iterations=2, learning_rate=0.1)
    return PurifiedClassifier(Linear(), ToyBackbone(), settings=settings, max_parallel=64).eval()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return uniform(3, 3, 8, 6, seed=1), torch.tensor([0, 1, 2])


def results_of(name: str, folder: Path) -> dict[str, Any]:
    study = make_study(name, toy(), ATTACKS, THREAT)
    return run_study(study, toy(), data(), folder / name, protocol=PROTOCOL)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Three studies, one of each kind of plot; not to be changed."""
    folder = tmp_path_factory.mktemp("studies")
    return {name: results_of(name, folder) for name in ("vote", "latent-weight", "trajectory")}


def test_levels_are_those_of_the_release() -> None:
    levels = karras_levels(18)
    assert levels[0] == pytest.approx(0.002)
    assert levels[4] == pytest.approx(0.1395, abs=5e-5)
    assert levels[-1] == pytest.approx(80.0)
    assert levels == sorted(levels)
    assert karras_levels(2, NoiseRange(sigma_min=0.1, sigma_max=3.0)) == pytest.approx([0.1, 3.0])


def test_all_variants_have_the_hooks_of_the_model(tmp_path: Path) -> None:
    """Or a study would take their effect for that of the setting."""
    study, model = make_study("latent-weight", toy(), ATTACKS, THREAT), toy()
    model.register_step_hook(lambda state: None)
    run_study(study, model, data(), tmp_path, protocol=PROTOCOL)
    found = [json.loads(path.read_text()) for path in tmp_path.rglob("settings.json")]
    assert len(found) == len(study.variants) > 1
    assert all("step hooks" in settings["models"]["defended"] for settings in found)


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_variants_have_names_of_their_own_and_run_on_any_model(name: str) -> None:
    study = make_study(name, toy(), ATTACKS, THREAT)
    names = [variant.name for variant in study.variants]
    assert len(set(names)) == len(names) > 0
    assert study.name == name
    for variant in study.variants:
        toy().settings.replace(**variant.changes)
        assert variant.attacks


def test_a_setting_is_varied_and_nothing_else() -> None:
    study = make_study("ssim-weight", toy(), ATTACKS, THREAT)
    assert {tuple(variant.changes) for variant in study.variants} == {("ssim_weight",)}
    assert all(variant.attacks == ATTACKS for variant in study.variants)
    assert [variant.changes["ssim_weight"] for variant in study.variants] == [v.value for v in study.variants]


def test_higher_intensities_take_their_steps_along() -> None:
    study = make_study("eps", toy(), ATTACKS, THREAT)
    for variant in study.variants:
        assert variant.value is not None
        factor = variant.value / THREAT.eps
        transfer, pgd = variant.attacks["transfer"], variant.attacks["pgd"]
        assert isinstance(transfer, Transfer)
        assert isinstance(pgd, PGD)
        assert transfer.threat.eps == pgd.threat.eps == variant.value
        assert isinstance(transfer.attack, PGD)
        assert transfer.attack.step_size == pytest.approx(0.02 * factor)
        assert pgd.step_size is None
    assert study.variants[0].value == THREAT.eps


def test_the_surrogates_level_is_its_sigma() -> None:
    study = make_study("surrogate", toy(), ATTACKS, THREAT)
    sources = [variant.attacks["surrogate"].source for variant in study.variants]  # pyright: ignore
    assert [source.sigma for source in sources if isinstance(source, NoiseAndDenoise)] == karras_levels(18)[:9]
    assert study.variants[4].name == "level-5"
    assert study.variants[4].value == pytest.approx(0.1395, abs=5e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_beta_goes_up_to_the_released_one(norm: str) -> None:
    study = make_study("beta", toy(), ATTACKS, ThreatModel(norm=norm, eps=0.5))
    attacks = [variant.attacks["consistency-disruption"] for variant in study.variants]
    assert all(isinstance(attack, ConsistencyDisruption) for attack in attacks)
    assert [attack.beta for attack in attacks] == [variant.value for variant in study.variants]  # pyright: ignore
    assert study.variants[-1].value == {"linf": 2e6, "l2": 1e9}[norm]


def test_each_variant_is_an_evaluation_with_its_setting(results: dict[str, dict[str, Any]]) -> None:
    found = results["latent-weight"]
    for name, settings in found["settings"].items():
        assert settings["models"]["defended"]["settings"]["latent_weight"] == float(name)
        assert settings["protocol"]["sanity_images"] == 0
        assert set(settings["models"]) == {"defended"}
    assert [entry["attack"] for entry in found["rows"][:3]] == ["clean", "transfer", "pgd"]
    assert len(found["rows"]) == 3 * len(found["settings"])


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = results_of("trajectory", tmp_path / "whole")
    part = tmp_path / "part" / "trajectory" / "as-it-is"
    results_of("trajectory", tmp_path / "part")
    kept = sorted(part.glob("units/**/*.jsonl"))
    stamps = {path: path.stat().st_mtime_ns for path in kept[1:]}
    kept[0].unlink()
    assert results_of("trajectory", tmp_path / "part") == whole
    assert {path: path.stat().st_mtime_ns for path in kept[1:]} == stamps


def test_the_disruption_attack_records_its_course(results: dict[str, dict[str, Any]]) -> None:
    course = results["trajectory"]["searches"]["as-it-is"]["defended/consistency-disruption"]
    assert {len(values) for values in course.values()} == {5 * toy().settings.iterations}
    assert all(0 <= share <= 1 for share in course["right"])
    assert 0.5 < course["latent_std"][0] < 1.5
    assert course["cross_entropy"][: toy().settings.iterations] == [0.0] * toy().settings.iterations
    assert min(course["cross_entropy"][toy().settings.iterations :]) > 0


@pytest.mark.parametrize("name", ["vote", "latent-weight", "trajectory"])
def test_plots_are_drawn_and_always_the_same(results: dict[str, dict[str, Any]], name: str) -> None:
    drawn = study_plot(results[name])
    assert drawn == study_plot(copy.deepcopy(results[name]))
    root = ElementTree.fromstring(drawn)
    words = "".join(root.itertext())
    assert "accuracy" in words
    expected = {"vote": "one latent", "latent-weight": "w_latent = 3.2", "trajectory": "latents along the attack"}
    assert expected[name] in words


def test_tables_hold_the_rows(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    text = study_markdown(results["latent-weight"])
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 1 + len(results["latent-weight"]["rows"])
    first = results["latent-weight"]["rows"][0]["row"]["average"]
    assert f"{first['value']:.3f} [{first['interval'][0]:.3f}, {first['interval'][1]:.3f}]" in rows[1]
    files, lacking = write_study(results["latent-weight"], tmp_path)
    assert [file.name for file in files] == ["study.json", "study.md", "study.svg"]
    assert lacking is None
