"""The whole measurement: figures as JSON, tables and a record's entry, its cost, its errors."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attack_toys import QUICK, THREATS, Linear, linear, wrapped
from cmap_defense.attacks import PGD, LatentAttack
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.classifier.speed import Speed
from cmap_defense.common.modules import building
from cmap_defense.common.passes import counting_passes
from cmap_defense.errors import InputTypeError, InputValueError, SettingsError
from cmap_defense.evaluation import Accuracy, Subset
from cmap_defense.quality import InceptionDistance, Quality, QualityRun
from cmap_defense.quality import run as module
from cmap_defense.quality.report import accuracy_rows, distance_rows, quality_markdown, write_quality
from tiny import tiny_backbone
from toys import uniform


def classifier() -> nn.Module:
    with building():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.Tanh(), nn.Linear(4, 3))


DATA = (uniform(12, 3, 8, 6, seed=7), torch.arange(12) % 3)
FEW = {"subset": Subset(count=3), "attack": PGD(THREATS["linf"], steps=2)}


def run_of(**changes: Any) -> QualityRun:
    model = changes.pop("model", None) or wrapped(classifier=classifier()).eval()
    return QualityRun(model, changes.pop("data", DATA), **({"name": "own"} | FEW | changes))


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)


@pytest.fixture(scope="module")
def found() -> Quality:
    return run_of(others={"second": Linear(), "third": linear}).run()


def test_the_values_agree_with_the_figures(found: Quality) -> None:
    values = found.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert found.samples.frechet is not None
    assert values["frechet"] == {
        "name": "Frechet distance in features of own",
        "samples": found.samples.frechet.samples,
        "halves": found.samples.frechet.halves,
        "images": 6,
        "module": "3",
        "numbers": 4,
    }
    assert values["frechet_reason"] is None
    assert values["fid"] is None
    assert "cmap-defense[quality]" in values["fid_reason"]
    assert list(values["classifiers"]) == ["own", "second", "third"]
    assert values["classifiers"]["second"] == values["classifiers"]["third"], "the same as a module and as a function"
    own = found.reconstructions.accuracies["own"].attacked_purified
    assert values["classifiers"]["own"]["attacked_purified"] == own.to_dict()
    assert values["attack"] == "PGD-2, linf 0.1"
    assert "does not know the defence" in values["attacker"]
    assert values["settings"] == QUICK.to_dict()
    assert values["backbone"] == "Denoiser"


def test_nothing_is_called_fid_that_is_none(found: Quality) -> None:
    values = found.to_dict()
    assert [row[0] for row in distance_rows(values)[1:]] == ["Frechet distance in features of own"] * 2 + ["FID"]
    assert distance_rows(values)[-1] == ["FID", "", "", "none"]
    assert "FID" not in json.dumps(found.figures())


def test_the_tables(found: Quality) -> None:
    values = found.to_dict()
    heading, samples, halves, _ = distance_rows(values)
    assert heading == ["distance", "between", "images", "value"]
    assert samples[1:] == ["samples and real images", "6 and 6", f"{values['frechet']['samples']:.4g}"]
    assert halves[1:] == ["two halves of real images", "6 and 6", f"{values['frechet']['halves']:.4g}"]
    heading, *rows = accuracy_rows(values)
    assert heading == ["classifier", "clean", "purified", "attacked", "attacked, purified"]
    assert [row[0] for row in rows] == ["own", "second", "third"]
    assert rows[0][1] == str(found.reconstructions.accuracies["own"].clean)


def test_the_files(found: Quality, tmp_path: Path) -> None:
    values = found.to_dict()
    files = write_quality(values, tmp_path / "new")
    assert [path.name for path in files] == ["quality.json", "quality.md"]
    assert json.loads(files[0].read_text(encoding="utf-8")) == values
    text = files[1].read_text(encoding="utf-8")
    assert text == quality_markdown(values)
    for words in ("the attacker does not know the defence", "no FID", "No FID: ", "mean SSIM", "two halves"):
        assert words in text


def test_without_the_distance_and_with_fid(found: Quality) -> None:
    samples = dataclasses.replace(
        found.samples,
        frechet=None,
        frechet_reason="a reason.",
        fid=InceptionDistance(3.25, 70, 60, "it"),
        fid_reason=None,
    )
    other = dataclasses.replace(found, samples=samples)
    values = other.to_dict()
    assert values["frechet"] is None
    assert values["fid"] == {"value": 3.25, "samples": 70, "real": 60, "source": "it"}
    assert distance_rows(values)[1:] == [
        ["Frechet distance in features of own", "", "", "none"],
        ["FID", "samples and real images", "70 and 60", "3.25"],
    ]
    assert "No Frechet distance: a reason." in quality_markdown(values)
    assert "FID has its features from it." in quality_markdown(values)
    figures = other.figures()["measured"]
    assert figures["FID"] == {"value": 3.25, "samples": 70, "real images": 60, "by": "it"}
    assert other.frechet_name not in figures


def test_a_records_entry(found: Quality) -> None:
    figures = found.figures(command="a command")
    assert list(figures) == ["measured"]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    inner = figures["measured"]
    assert inner["command"] == "a command"
    assert inner[found.frechet_name]["images in each set"] == 6
    assert inner["accuracy"]["own"]["clean"] == str(found.reconstructions.accuracies["own"].clean)
    assert inner["attack"] == "PGD-2, linf 0.1, on the bare classifier: the attacker does not know the defence"
    record = tiny_record().replace(figures=figures)
    assert type(record).from_json(record.to_json()) == record


def tiny_record() -> BackboneRecord:
    backbone = tiny_backbone()
    return BackboneRecord(
        name="tiny",
        network="ncsnpp",
        network_config={},
        noise=backbone.noise.to_dict(),
        image_shape=backbone.image_shape,
        weights_sha256="",
    )


def test_passes_and_steps_are_those_that_happen() -> None:
    model = wrapped(classifier=classifier(), max_parallel=5).eval()
    run = run_of(model=model, others={"second": Linear()}, group=2)
    said: list[str] = []
    with counting_passes() as passes:
        run.run(said.append)
    assert passes.total == run.passes == 64 + 3 * 3 * 2 * (QUICK.iterations + 1)
    assert said.count("") == run.steps


def test_measuring_the_speed_takes_as_many_images_as_its_seconds_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, then four times as many, up to a group; each image takes a second on this machine. Where all would take
    hours, more seconds are allowed."""
    clock, seen, slow = [0.0], [], [1e-3]

    def measure(model: Any, images: torch.Tensor) -> Speed:
        seen.append(len(images))
        clock[0] += len(images)
        return Speed(slow[0] / len(images), None)

    monkeypatch.setattr(module, "measure_speed", measure)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    for seconds, sizes in ((3.0, [1]), (4.0, [1, 4]), (15.0, [1, 4]), (100.0, [1, 4, 5])):
        seen.clear()
        run = run_of(model=wrapped(classifier=classifier()).eval(), subset=Subset(count=6), group=5)
        assert run.measure_speed(seconds).seconds == 1e-3 / sizes[-1]
        assert seen == sizes
    seen.clear()
    slow[0] = 100 * 17 / run.passes
    run.measure_speed(0.0)
    assert seen == [1, 4], "a hundredth is 17 s at the pace of one image, 4.25 s at that of four, and five take 16 s"
    monkeypatch.undo()
    assert run_of().measure_speed().seconds > 0


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


def test_what_it_is_by_default() -> None:
    run = QualityRun(wrapped().eval(), (uniform(600, 3, 8, 6, seed=0), torch.zeros(600, dtype=torch.int64)))
    assert len(run.images) == 512
    assert len(run.comparison.real) == 600
    assert isinstance(run.attack, PGD)
    assert (run.attack.steps, run.attack.threat.norm, run.attack.threat.eps) == (20, "linf", 8 / 255)


def test_other_attacks_have_their_names() -> None:
    attack = LatentAttack(THREATS["l2"], steps=3, latents=2)
    with pytest.raises(SettingsError):
        run_of(attack=attack).run()  # it needs the defence
    found = dataclasses.replace(run_of().run(), attack=attack)
    assert found.attack_name == "LatentAttack-3, l2 1"


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (DataLoader(TensorDataset(*DATA)), InputTypeError, r"loader\.dataset"),
        ((DATA[0], DATA[1] - 9), InputValueError, "integers from 0, but that of image 0 is -"),
        ((DATA[0], DATA[1] + 9), InputValueError, "the classes of the model 'own', but that of image 0 is"),
    ],
)
def test_data_that_cannot_be_used_are_refused_at_once(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_of(data=data)


def test_wrong_predictions_are_counted() -> None:
    labels = (linear(DATA[0]).argmax(dim=1) + 1) % 3
    found = run_of(model=wrapped().eval(), data=(DATA[0], labels)).run()
    assert found.reconstructions.accuracies["own"].clean == Accuracy(0, 3)
    assert found.samples.frechet is None


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
        ({"data": (uniform(12, 3, 8, 8, seed=0), DATA[1])}, InputValueError, "8 x 6"),
        ({"data": (2 * DATA[0], DATA[1])}, InputValueError, r"\[0, 1\]"),
    ],
)
def test_mistakes(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_of(**changes)


def test_labels_are_the_classifiers_classes() -> None:
    def few(images: Tensor) -> Tensor:
        return linear(images)[:, :2]

    with pytest.raises(InputValueError, match="from 0 to 1, the classes of the model"):
        run_of(model=wrapped(classifier=few).eval()).run()


@pytest.mark.gpu
def test_a_cuda_device_finds_the_same() -> None:
    model = wrapped(classifier=classifier()).eval()
    expected = run_of(model=model).run()
    found = run_of(model=model.to("cuda")).run()
    assert found.samples.frechet is not None
    assert expected.samples.frechet is not None
    assert found.samples.frechet.samples == pytest.approx(expected.samples.frechet.samples, rel=1e-2)
    assert found.reconstructions.l1 == pytest.approx(expected.reconstructions.l1, rel=1e-2)
    assert found.reconstructions.accuracies == expected.reconstructions.accuracies
