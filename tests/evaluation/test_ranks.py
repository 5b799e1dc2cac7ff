"""Several processes on one folder: together they are one job, and end with what one of them would have made alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from filelock import FileLock

from cmap_defense.common.ranks import Ranks, ranks
from cmap_defense.evaluation import evaluate
from evaluated import BRIEF, CHECKED, Interrupted, defended, evaluation, interrupt, options, results, together
from processes import run_ranks


def run(folder: Path) -> list[dict[str, Any]]:
    """What happened to each of two ranks."""
    ended = run_ranks(together, folder)
    found = [folder / f"rank-{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in found), ended
    return [json.loads(path.read_text()) for path in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    evaluation(folder, protocol=CHECKED).run()
    return folder


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folders in several states, and what two ranks met in each of them."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(Interrupted):
        evaluation(folder / "begun", protocol=BRIEF).run(interrupt(3))
    with pytest.raises(Interrupted):
        evaluation(folder / "changed", protocol=BRIEF.replace(predictions=9)).run(interrupt(0))
    (folder / "locked").mkdir()
    with FileLock(folder / "locked" / ".lock"):
        return folder, run(folder)


def test_two_ranks_make_what_one_process_makes(happened: tuple[Path, list[dict[str, Any]]], alone: Path) -> None:
    """The same bytes, each of them having done its part and no work unit twice."""
    folder, found = happened
    assert [rank["whole"].get("message") for rank in found] == [None, None]
    assert results(folder / "whole") == results(alone)
    units = [[unit.task, unit.seed, unit.group] for unit in evaluation(alone, protocol=CHECKED).units()]
    assert sorted(found[0]["own"] + found[1]["own"]) == sorted(units)
    assert abs(len(found[0]["own"]) - len(found[1]["own"])) <= 1
    assert {path.name for path in (folder / "whole" / "timings").iterdir()} == {"rank-0.jsonl", "rank-1.jsonl"}


def test_two_ranks_go_on_where_one_process_was(happened: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = happened
    assert [rank["begun"].get("message") for rank in found] == [None, None]
    assert results(folder / "begun") == results(folder / "second")


@pytest.mark.parametrize(
    ("name", "said"), [("changed", "predictions: 9 before, 2 now"), ("locked", "Another evaluation is writing to")]
)
def test_a_folder_is_refused_to_both_ranks_at_once(
    name: str, said: str, happened: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, found = happened
    for rank in found:
        assert rank[name]["error"] == "EvaluationError"
        assert said in rank[name]["message"]
    assert not (folder / name / "units").exists()


def test_both_ranks_have_the_report_without_a_folder(happened: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = happened
    expected = evaluate(defended(), **options(protocol=BRIEF)).to_dict()
    for rank in found:
        assert rank["nowhere"]["value"] == {name: expected[name] for name in rank["nowhere"]["value"]}


def test_a_process_group_of_the_callers_is_kept(happened: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = happened
    assert [rank["group kept"] for rank in found] == [True, True]


def test_ranks_with_different_settings_are_refused_all_of_them(happened: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = happened
    assert "Rank 1 was started with other settings" in found[1]["at odds"]["message"]
    assert "predictions: 2 before, 3 now" in found[1]["at odds"]["message"]
    assert found[0]["at odds"]["error"] == "EvaluationError", found[0]["at odds"]


def test_one_job_can_evaluate_again_and_again(happened: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = happened
    for name in ("second", "third"):
        assert all(name in rank for rank in found), "a rank was left waiting"
        assert [rank[name].get("message") for rank in found] == [None, None]


def test_a_process_alone_needs_no_group() -> None:
    with ranks() as team:
        assert team == Ranks(0, 1)
        assert not dist.is_initialized()
        assert team.shared("value") == "value"
        team.wait()
