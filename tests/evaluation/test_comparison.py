"""Defences side by side: the rows are those of evaluations, nothing is done twice, and the files agree."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from attack_toys import Denoiser, Linear, labelled, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import PGD, SUITES, LatentAttack, ThreatModel, Transfer
from cmap_defense.errors import EvaluationError, SettingsError
from cmap_defense.evaluation import Comparison, Protocol, compare, evaluate, write_comparison
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers import Identity, OneStep
from evaluated import Interrupted

THREAT = ThreatModel(eps=0.1)
ATTACKS = {"transfer": Transfer(PGD(THREAT, steps=2)), "exact": PGD(THREAT, steps=2, gradient=Unrolled())}
PROTOCOL = Protocol(predictions=2, reevaluations=2, group=2, sanity_images=0, search_on_clean=False)


def models() -> dict[str, PurifiedClassifier]:
    backbone, classifier = Denoiser(), Linear()
    made = {"none": Identity(), "one step": OneStep(level=0.3, n_latents=2)}
    return {name: PurifiedClassifier(classifier, backbone, purifier=purifier).eval() for name, purifier in made.items()}


def compared(out: Path, **options: Any) -> Comparison:
    given: dict[str, Any] = {"attacks": ATTACKS, "protocol": PROTOCOL, "threads": 1}
    return compare(models(), labelled(5), out, **(given | options))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("comparison")
    return out, compared(out)


def test_each_row_is_that_of_an_evaluation(found: tuple[Path, Comparison], tmp_path: Path) -> None:
    _, comparison = found
    assert [row.name for row in comparison.rows] == ["none", "one step"]
    alone = evaluate(
        models()["one step"], labelled(5), attacks=ATTACKS, protocol=PROTOCOL, threads=1, out=tmp_path / "alone"
    )
    row = comparison.rows[1]
    assert (row.passes, row.n_latents) == (2, 2)
    assert row.clean == alone.row("clean").reevaluated
    assert row.attacked == {name: alone.row(name).reevaluated for name in ATTACKS}


def test_no_row_is_below_the_worst(found: tuple[Path, Comparison]) -> None:
    for row in found[1].rows:
        assert row.worst.value <= min(share.value for share in (row.clean, *row.attacked.values()))
    without = found[1].rows[0]
    assert without.worst.value < without.clean.value, "the undefended classifier falls to its own gradient"


def test_what_is_done_is_not_done_again(found: tuple[Path, Comparison]) -> None:
    out, comparison = found
    done: list[int] = []
    again = compared(out, progress=lambda number, total: done.append(number))
    assert done == []
    assert again.to_dict()["rows"] == comparison.to_dict()["rows"]
    with pytest.raises(EvaluationError, match="eps"):
        compared(out, attacks={"transfer": Transfer(PGD(ThreatModel(eps=0.2), steps=2))})


def test_a_comparison_goes_on_where_it_was_stopped_and_takes_another_defence(
    found: tuple[Path, Comparison], tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Interrupted

    def without_time(comparison: Comparison) -> list[Any]:
        return [dataclasses.replace(row, seconds=None) for row in comparison.rows]

    with pytest.raises(Interrupted):
        compared(tmp_path / "part", progress=stop)
    first = {"none": models()["none"]}
    compare(first, labelled(5), tmp_path / "more", attacks=ATTACKS, protocol=PROTOCOL, threads=1)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "more").rglob("*.jsonl") if "units" in path.parts}
    assert done
    for name in ("part", "more"):
        again = compared(tmp_path / name)
        assert again.differences == found[1].differences != ()
        assert without_time(again) == without_time(found[1])
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_the_files_say_what_the_table_says(found: tuple[Path, Comparison], tmp_path: Path) -> None:
    _, comparison = found
    files, lacking = write_comparison(comparison, tmp_path / "written")
    assert lacking is None
    assert [file.name for file in files] == ["comparison.json", "comparison.md", "comparison.svg"]
    assert json.loads(files[0].read_text()) == comparison.to_dict()
    head, *rows = comparison.table()
    text = files[1].read_text()
    assert all(f"| {' | '.join(row)} |" in text for row in (head, *rows))
    drawn = "".join(ElementTree.parse(files[2]).getroot().itertext())
    assert "one step" in drawn
    assert "mathdefault" not in drawn, "numbers on the axis are plain text"
    assert len(repr(comparison).splitlines()) == 4
    gap = next(gap for gap in comparison.differences if gap.attack == "exact")
    assert (gap.first, gap.second, gap.images) == ("none", "one step", 5)
    none, one_step = (row.attacked["exact"].value for row in comparison.rows)
    assert gap.value == pytest.approx(none - one_step)
    gap = next(gap for gap in comparison.differences if gap.attack == "worst of these")
    assert gap.value == pytest.approx(comparison.rows[0].worst.value - comparison.rows[1].worst.value)
    assert f"| none | one step | {' | '.join(map(str, comparison.differences))} |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "must be defences by their names"),
        ([wrapped()], "must be defences by their names"),
        (wrapped(), "must be defences by their names, .* but are PurifiedClassifier"),
        ({"a/b": None}, "must be a PurifiedClassifier"),
        ({"bare": Linear()}, "must be a PurifiedClassifier"),
    ],
)
def test_wrong_models_are_refused(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        compare(given, labelled(2), tmp_path)
    for name in ("a/b", "..", "", "comparison.md", "a.", "x" * 300, "a\0b"):
        with pytest.raises(SettingsError, match="name of a folder"):
            compare({name: models()["none"]}, labelled(2), tmp_path)
    with pytest.raises(SettingsError, match="name of a folder"):
        compare({"a": models()["none"], "A": models()["none"]}, labelled(2), tmp_path)
    with pytest.raises(SettingsError, match="needs attacks"):
        compare(models(), labelled(2), tmp_path, attacks={})


def test_the_folder_of_an_evaluation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(EvaluationError, match="one evaluation or certification"):
        compare(models(), labelled(2), tmp_path)


def test_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    """An attack on latents does not suit one-step purification, the second of the two."""
    started: list[int] = []
    latent = {"latent": LatentAttack(THREAT, steps=1, latents=1)}
    given = {"cmap": wrapped().eval(), "one": models()["one step"]}
    with pytest.raises(SettingsError, match="OneStep"):
        compare(given, labelled(2), tmp_path, attacks=latent, progress=lambda done, _: started.append(done))
    assert started == []


@pytest.mark.parametrize("order", [("cmap", "one step"), ("one step", "cmap")])
def test_of_a_set_by_name_all_defences_meet_the_same_attacks(
    order: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = LatentAttack(THREAT, steps=1, latents=1)
    monkeypatch.setitem(SUITES, "standard", lambda threat: ATTACKS | {"latent": latent})  # pyright: ignore[reportArgumentType]
    given = {"cmap": wrapped().eval(), "one step": models()["one step"]}
    options: dict[str, Any] = {"attacks": "standard", "protocol": PROTOCOL, "threads": 1}
    comparison = compare({name: given[name] for name in order}, labelled(2), tmp_path, **options)
    assert [list(row.attacked) for row in comparison.rows] == 2 * [list(ATTACKS)]
    assert list(comparison.left_out.values()) == [["latent"]]
    files, _ = write_comparison(comparison, tmp_path / "written")
    assert "Left out, since they need a purifier that optimises latents: latent." in files[1].read_text()


def test_a_work_unit_that_was_not_timed_has_no_seconds(tmp_path: Path) -> None:
    """As after a kill between the two files."""
    compared(tmp_path)
    shutil.rmtree(tmp_path / "one step" / "timings")
    assert [row.seconds is None for row in compared(tmp_path).rows] == [False, True]
