"""The whole measurement: figures as JSON, tables and a record's entry, its cost, its errors."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from attack_toys import QUICK, THREATS, Linear, linear, wrapped
from cmap_defense.attacks import PGD, LatentAttack
from cmap_defense.common.modules import building
from cmap_defense.common.passes import counting_passes
from cmap_defense.errors import InputTypeError, InputValueError, SettingsError
from cmap_defense.evaluation import Subset
from cmap_defense.quality import Quality, QualityRun
from cmap_defense.quality.report import accuracy_rows, distance_rows, quality_markdown, write_quality
from toys import uniform


def classifier() -> nn.Module:
    with building():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.Tanh(), nn.Linear(4, 3))


DATA = (uniform(12, 3, 8, 6, seed=7), torch.arange(12) % 3)
FEW = {"subset": Subset(count=3), "attack": PGD(THREATS["linf"], steps=2)}


NAME = "Frechet distance in features of own"


def run_of(**changes: Any) -> QualityRun:
    model = changes.pop("model", None) or wrapped(classifier=classifier()).eval()
    return QualityRun(model, changes.pop("data", DATA), **({"name": "own"} | FEW | changes))


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)


@pytest.fixture(scope="module")
def found() -> Quality:
    return run_of(others={"second": Linear(), "third": linear}).run()


def test_the_values_and_a_records_entry(found: Quality) -> None:
    values, figures = found.to_dict(), found.figures(command="a command")
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    frechet = values["frechet"]
    assert frechet.items() >= {"name": NAME, "images": 6, "module": "3", "numbers": 4}.items()
    assert values["frechet_reason"] is values["fid"] is None
    assert "cmap-defense[quality]" in values["fid_reason"]
    assert list(values["classifiers"]) == ["own", "second", "third"]
    assert values["classifiers"]["second"] == values["classifiers"]["third"], "the same as a module and as a function"
    assert (values["attack"], values["backbone"], values["settings"]) == (
        "PGD-2, linf 0.1",
        "Denoiser",
        QUICK.to_dict(),
    )
    assert "does not know the defence" in values["attacker"]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert "FID" not in json.dumps(figures), "nothing is called FID that is none"
    inner = figures["measured"]
    assert (inner["command"], inner[NAME]["images in each set"]) == ("a command", 6)
    assert inner["accuracy"]["own"]["clean"] == str(found.reconstructions.accuracies["own"]["clean"])
    assert inner["attack"] == "PGD-2, linf 0.1, on the undefended classifier: the attacker does not know the defence"
    assert dataclasses.replace(found, attack=LatentAttack(THREATS["l2"], steps=3)).attack_name == "LatentAttack-3, l2 1"


def test_the_tables_and_files(found: Quality, tmp_path: Path) -> None:
    values = found.to_dict()
    heading, *rows = distance_rows(values)
    assert heading == ["distance", "between", "images", "value"]
    assert rows == [
        [NAME, "samples and real images", "6 and 6", f"{values['frechet']['samples']:.4g}"],
        [NAME, "two halves of real images", "6 and 6", f"{values['frechet']['halves']:.4g}"],
        ["FID", "", "", "none"],
    ]
    heading, *rows = accuracy_rows(values)
    assert heading == ["classifier", "clean", "purified", "attacked", "attacked, purified"]
    assert [row[0] for row in rows] == ["own", "second", "third"]
    assert rows[0][1] == str(found.reconstructions.accuracies["own"]["clean"])
    files = write_quality(values, tmp_path / "new")
    assert json.loads(files[0].read_text(encoding="utf-8")) == values
    text = files[1].read_text(encoding="utf-8")
    for words in ("the attacker does not know the defence", "no FID", "No FID: ", "mean SSIM", "two halves"):
        assert words in text


def test_without_the_distance_and_with_fid(found: Quality) -> None:
    fid = {"value": 3.25, "samples": 70, "real": 60, "source": "it"}
    distances = {"frechet": None, "frechet_reason": "a reason.", "fid": fid, "fid_reason": None}
    other = dataclasses.replace(found, distances=distances)
    assert distance_rows(other.to_dict())[1:] == [
        [NAME, "", "", "none"],
        ["FID", "samples and real images", "70 and 60", "3.25"],
    ]
    text = quality_markdown(other.to_dict())
    assert "No Frechet distance: a reason." in text
    assert "FID has its features from it." in text
    figures = other.figures()["measured"]
    assert figures["FID"] == {"value": 3.25, "samples": 70, "real images": 60, "by": "it"}
    assert NAME not in figures


def test_passes_and_steps_are_those_that_happen() -> None:
    model = wrapped(classifier=classifier(), max_parallel=5).eval()
    run = run_of(model=model, others={"second": Linear()}, group=2)
    said: list[tuple[int, int]] = []
    with counting_passes() as passes:
        run.run(lambda *now: said.append(now))
    assert passes.total == run.passes == 64 + 3 * 3 * 2 * (QUICK.iterations + 1)
    assert said == [(done + 1, run.steps) for done in range(run.steps)]


def test_it_is_the_same_again_and_leaves_modes_alone() -> None:
    model = wrapped(classifier=classifier())
    model.train()
    second = Linear().train()
    state = torch.get_rng_state()
    found = [run_of(model=model, others={"second": second}, seed=3).run().to_dict() for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert second.training
    assert run_of(model=model, seed=4).run().to_dict()["frechet"] != found[0]["frechet"]


def test_images_are_unit_whatever_the_model_takes() -> None:
    own = classifier()
    unit = wrapped(classifier=own, normalize=(0.4, 0.2)).eval()
    normalized = wrapped(classifier=own, backbone=unit.backbone, normalize=(0.4, 0.2), inputs="normalized").eval()
    assert run_of(model=unit).run().to_dict() == run_of(model=normalized).run().to_dict()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 1}, SettingsError, "samples must be at least 2"),
        ({"group": 0}, SettingsError, "group"),
        ({"seed": 0.5}, SettingsError, "seed"),
        ({"attack": "PGD"}, SettingsError, "such as PGD"),
        ({"others": {"own": Linear()}}, SettingsError, "other names than the classifier, which is 'own'"),
        ({"features": "nowhere"}, SettingsError, "no module 'nowhere'"),
        ({"subset": Subset(count=13)}, SettingsError, "the data set has 12"),
        ({"data": 3}, InputTypeError, "has none"),
        ({"data": DataLoader(TensorDataset(*DATA))}, InputTypeError, r"loader\.dataset"),
        ({"data": (DATA[0], DATA[1] - 9)}, InputValueError, "integers from 0, but that of image 0 is -"),
        ({"data": (DATA[0], DATA[1] + 9)}, InputValueError, "the classes of the model 'own', but that of image 0 is"),
        ({"data": (uniform(12, 3, 8, 8, seed=0), DATA[1])}, InputValueError, "8 x 6"),
        ({"data": (2 * DATA[0], DATA[1])}, InputValueError, r"\[0, 1\]"),
    ],
)
def test_mistakes(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_of(**changes)


@pytest.mark.gpu
def test_a_cuda_device_finds_the_same() -> None:
    model = wrapped(classifier=classifier()).eval()
    expected = run_of(model=model).run()
    found = run_of(model=model.to("cuda")).run()
    distance, expected_distance = (of.distances["frechet"]["samples"] for of in (found, expected))
    assert distance == pytest.approx(expected_distance, rel=1e-2)
    assert found.reconstructions.l1 == pytest.approx(expected.reconstructions.l1, rel=1e-2)
    assert found.reconstructions.accuracies == expected.reconstructions.accuracies
