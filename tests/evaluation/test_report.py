"""The one call: a folder, a report, and a headline only where the attacks were seen to work."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_toys import labelled, linear
from cmap_defense.attacks import PGD, ThreatModel, Transfer
from cmap_defense.errors import EvaluationError, MissingExtraError, UnknownNameError
from cmap_defense.evaluation import Accuracy, Protocol, Report, evaluate
from cmap_defense.evaluation.report import load_report
from cmap_defense.evaluation.report.report import _means
from evaluated import BRIEF, IMAGES, Interrupted, Shaky, defended, evaluation, interrupt, options

THREAT = ThreatModel(eps=0.02)
COUNT = 12


def two_classes(images: Tensor) -> Tensor:
    """Another model with the same classes."""
    return linear(images.flip(1))


ATTACKS = {"transfer": Transfer(PGD(THREAT, steps=2), source=two_classes), "pgd": PGD(THREAT, steps=4, eot=2)}
CAREFUL = Protocol(predictions=4, reevaluations=6, seeds=(0, 1), group=5, sanity_images=COUNT, gradient_samples=4)


def evaluated(model: Any = None, **changes: Any) -> Report:
    """A model without latents, under attacks that work on it as attacks should, or with some of that changed."""
    given: dict[str, Any] = {"attacks": ATTACKS, "protocol": CAREFUL, "threads": 1, "data": labelled(COUNT)}
    return evaluate(Shaky(0.3) if model is None else model, **(given | changes))


@pytest.fixture(scope="module")
def report() -> Report:
    return evaluated()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Of a purified classifier, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, evaluate(defended(), **options(out=folder, class_names=np.array(list("abcd"))))


def test_images_and_labels_may_be_two_arguments() -> None:
    images, labels = labelled(4)
    given: dict[str, Any] = {"attacks": {"pgd": PGD(THREAT, steps=1)}, "protocol": BRIEF, "threads": 1}
    reports = [evaluate(Shaky(0.3), *data, **given) for data in ((images, labels), ((images, labels),))]
    assert reports[0].rows == reports[1].rows


def test_where_all_checks_pass_there_is_a_headline(report: Report) -> None:
    assert report.refused == []
    assert len(report.checks) == 10
    assert all(check.passed for check in report.checks)
    assert report.headline is not None
    assert report.headline.accuracy.total == COUNT
    assert report.headline.accuracy.value <= min(report.row(name).reevaluated.value for name in ("clean", *ATTACKS))
    assert report.headline.accuracy.value < report.row("clean").reevaluated.value
    assert set(report.headline.chosen) == {"transfer", "pgd"}
    assert sum(report.headline.chosen.values()) == 2 * COUNT
    assert report.headline.spread is not None
    assert report.headline.lowest.value <= min(report.row(name).vote.value for name in ATTACKS)
    assert report.missing == 0
    assert report.curves == {}
    assert [sweep.name for sweep in report.sweeps] == ["steps", "eps"]
    assert [row["samples"] for row in report.gradients] == [1, 2]


def misleading(images: Tensor) -> Tensor:
    """It has a gradient that leads nowhere."""
    return linear(images).detach() + 1e-9 * linear(1 - images)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no attack": ({"attacks": {}}, "there was no attack"),
    "no checks": (
        {"protocol": CAREFUL.replace(sanity_images=0)},
        "help the defence: could not be checked, not measured",
    ),
    "labels of another data set": (
        {"data": (labelled(COUNT)[0], (labelled(COUNT)[1] + 1) % 4)},
        "clean images are classified better than by always predicting one class: 0.",
    ),
    "small steps": (
        {"attacks": ATTACKS | {"pgd": dataclasses.replace(ATTACKS["pgd"], step_size=0.004)}},
        "a gradient attack starts at random with a step of eps / 4 at least: 0 of 1",
    ),
    "a gradient that leads nowhere": (
        {"model": misleading},
        "with every image allowed, accuracy is 0: 12 of 12 images keep their vote",
    ),
    "no gradient": ({"model": lambda images: linear(0 * images + images.detach())}, "zero throughout an attack: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_one_does_not_there_is_none_and_the_reason_is_said(name: str) -> None:
    changed, said = REFUSED[name]
    found = evaluated(**({"protocol": CAREFUL.replace(predictions=1, reevaluations=1, seeds=(0,))} | changed))
    assert found.headline is None
    assert any(said in reason for reason in found.refused), found.refused
    failed = [check for check in found.checks if not check.passed]
    assert len(found.refused) == len(failed) + (not found.checks)
    assert found.to_dict()["headline"] is None
    assert [row.attack for row in found.rows] == ["clean", *changed.get("attacks", ATTACKS)]


def test_an_unfinished_evaluation_has_no_headline_and_rows_of_what_is_whole(tmp_path: Path) -> None:
    found = evaluation(tmp_path, Shaky(0.3), attacks=ATTACKS)
    with pytest.raises(Interrupted):
        found.run(interrupt(9))
    report = found.report()
    assert report.headline is None
    assert report.refused == [f"{report.missing} work units are not done yet. Give the same command again to go on."]
    assert report.missing == len(found.units()) - 9
    assert [row.attack for row in report.rows] == ["clean", "transfer"]
    assert report.checks == []
    assert evaluation(tmp_path / "new", Shaky(0.3), attacks=ATTACKS).report().rows == []


def test_the_rows_are_what_the_lines_say(whole: tuple[Path, Report]) -> None:
    folder, report = whole
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    names = [("defended", name) for name in ("clean", "transfer", "bpda-eot")]
    names += [("undefended", name) for name in ("clean", "pgd")]
    assert [(row.model, row.attack) for row in report.rows] == names
    for row in report.rows:
        own = [line for line in lines if (line["model"], line["attack"]) == (row.model, row.attack)]
        predictions = np.array([line["predictions"] for line in own]).reshape(2, IMAGES, -1)
        truth = np.array([line["label"] for line in own]).reshape(2, IMAGES)
        assert row.one_shot.value == pytest.approx((predictions[:, :, 0] == truth).mean())
        assert row.average.value == pytest.approx((predictions == truth[:, :, None]).mean())
        assert (row.images, row.runs) == (IMAGES, 2)
        assert row.queries == own[0].get("queries")
        assert row == report.row(row.attack, row.model)
    assert report.row("bpda-eot").search_on_clean is not None
    assert report.row("transfer").search is None
    with pytest.raises(UnknownNameError, match="has no row"):
        report.row("pgd")


def test_the_course_of_purifications_and_searches(whole: tuple[Path, Report]) -> None:
    folder, report = whole
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    given = evaluation(folder)
    assert list(report.curves) == [f"defended/{name}" for name in ("clean", "transfer", "bpda-eot")]
    for name, curve in report.curves.items():
        ways = [line["vote_right"] for line in lines if f"{line['model']}/{line['attack']}" == name]
        assert curve["accuracy"] == pytest.approx(np.mean(ways, axis=0).tolist())
        assert curve["iterations"] == [0, 1, 2]
        tensors = [given.folder.tensors(unit) for unit in given.units() if unit.task == name]
        for part in ("total", "l1", "ssim", "latent", "latent_mean", "latent_std"):
            values = torch.cat([found[f"loop.{part}"] for found in tensors], dim=1)
            assert curve[part] == pytest.approx(values.double().mean(dim=1).tolist())
    assert set(report.searches) == {"defended/transfer", "defended/bpda-eot"}
    searched = [given.folder.tensors(unit) for unit in given.units() if unit.task == "defended/bpda-eot"]
    loss = torch.cat([found["history.loss"] for found in searched], dim=1).double().mean(dim=1)
    assert report.searches["defended/bpda-eot"]["loss"] == pytest.approx(loss.tolist())


def test_the_folder_has_the_results_and_the_report(whole: tuple[Path, Report]) -> None:
    folder, report = whole
    assert {"settings.json", "results.jsonl", "report.json", "report.md", "units", "timings"} <= {
        path.name for path in folder.iterdir()
    }
    assert json.loads((folder / "report.json").read_text()) == report.to_dict() == load_report(folder).to_dict()
    assert report.to_dict()["class_names"] == ["a", "b", "c", "d"]
    assert report.settings == json.loads((folder / "settings.json").read_text())
    text = (folder / "report.md").read_text()
    assert ("## No headline" in text) == (report.headline is None)
    for reason in report.refused:
        assert f"- {reason}" in text
    for row in report.rows:
        assert f" | {row.one_shot} (" in text
    assert "| Runs | 2, with seeds 0, 7 |" in text
    assert "| Latents | K = 2 |" in text
    html = (folder / "report.html").read_text()
    assert "eps (linf)" in html
    assert "bpda-eot at other size" in html


def test_every_accuracy_in_the_json_has_its_interval(report: Report) -> None:
    def accuracies(value: Any, values: Any) -> int:
        if isinstance(value, Accuracy):
            assert values == {
                "value": value.value,
                "interval": list(value.interval),
                "correct": value.correct,
                "total": value.total,
            }
            return 1
        if dataclasses.is_dataclass(value):
            return sum(
                accuracies(getattr(value, field.name), values[field.name]) for field in dataclasses.fields(value)
            )
        if isinstance(value, Mapping):
            return sum(accuracies(part, values[name]) for name, part in value.items())
        if isinstance(value, (list, tuple)):
            return sum(accuracies(*pair) for pair in zip(value, values, strict=True))
        return 0

    assert accuracies(report, report.to_dict()) == 3 * 5 + 2 + 4


def test_without_the_extra_of_the_page_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise MissingExtraError("pip install cmap-defense[report]")

    monkeypatch.setattr("cmap_defense.evaluation.report.page.page", missing)
    evaluated(attacks={}, protocol=BRIEF, out=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.json", "report.md"} <= names
    assert "report.html" not in names


def test_without_a_folder_only_the_report_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = evaluated(attacks={}, protocol=BRIEF)
    assert found.row("clean").images == COUNT
    assert found.settings["protocol"] == BRIEF.to_dict()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "[]", '{"rows": []}'])
def test_what_is_no_report_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"report\.json"):
        load_report(tmp_path)


def test_a_search_that_ends_earlier_for_some_images_keeps_its_last_step() -> None:
    """An attack may stop when all images of its group are misclassified."""
    short, long = torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0], [6.0], [7.0]])
    parts = [{"history.loss": short, "history.odd": short}, {"history.loss": long}]
    assert _means(parts, "history.") == {"loss": [3.0, 10 / 3, 11 / 3]}
