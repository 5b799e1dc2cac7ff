"""The folder of an evaluation: whole files or none, one job at a time, of one kind or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cmap_defense.errors import EvaluationError
from cmap_defense.evaluation.results import FORMAT, WRITTEN, ResultsFolder, Timing, WorkUnit

UNIT = WorkUnit("defended/pgd", 7, 12)
LINES = [{"image": 3, "predictions": [1, 0]}, {"image": 4, "predictions": []}]
TENSORS = {"images": torch.arange(6.0).view(2, 3), "history.loss": torch.ones(4, 2).T}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_work_unit_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path / "deep" / "folder")
    assert not store.done(UNIT)
    store.write(UNIT, LINES, TENSORS)
    assert store.done(UNIT)
    assert store.lines(UNIT) == LINES
    found = store.tensors(UNIT)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert files(store.path) == [f"units/defended/pgd/7-00012{end}" for end in (".jsonl", ".safetensors")]


def test_tensors_that_cannot_be_read_are_an_error_that_names_them(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path)
    store.write(UNIT, LINES, TENSORS)
    path = tmp_path / "units/defended/pgd/7-00012.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(EvaluationError, match=r"7-00012\.safetensors cannot .* delete it and 7-00012\.jsonl beside it"):
        store.tensors(UNIT)


@pytest.mark.parametrize("kept", [0, 20, -1])
def test_lines_that_cannot_be_read_are_an_error_that_names_them(tmp_path: Path, kept: int) -> None:
    store = ResultsFolder(tmp_path)
    store.write(UNIT, LINES, TENSORS)
    path = tmp_path / "units/defended/pgd/7-00012.jsonl"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EvaluationError, match=r"7-00012\.jsonl cannot be read .* delete it"):
        store.lines(UNIT)


def failing(*_: Any, **__: Any) -> None:
    raise OSError("the disk is full")


def test_a_failing_save_of_tensors_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a final name, neither tensors nor lines; and the next attempt is as good as the first."""
    store = ResultsFolder(tmp_path)

    def half(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        failing()

    with monkeypatch.context() as patched:
        patched.setattr("cmap_defense.evaluation.results.save_file", half)
        with pytest.raises(OSError, match="full"):
            store.write(UNIT, LINES, TENSORS)
    assert not store.done(UNIT)
    assert store.tensors(UNIT) == {}
    assert all(name.endswith(".partial") for name in files(tmp_path))
    store.write(UNIT, LINES, TENSORS)
    assert store.lines(UNIT) == LINES
    assert torch.equal(store.tensors(UNIT)["images"], TENSORS["images"])
    assert not any(name.endswith(".partial") for name in files(tmp_path))


def test_what_was_left_half_written_is_no_work_unit(tmp_path: Path) -> None:
    store, folder = ResultsFolder(tmp_path), tmp_path / "units/defended/pgd"
    folder.mkdir(parents=True)
    for end in (".jsonl", ".safetensors"):
        (folder / f".7-00012{end}.partial").write_bytes(b'{"image": 3, "ans')
    assert not store.done(UNIT)
    assert store.tensors(UNIT) == {}
    store.write(UNIT, LINES, TENSORS)
    assert store.lines(UNIT) == LINES


# --- settings ---------------------------------------------------------------------------------------------------------

TASKS = {"defended/pgd": {"steps": 2}}
SETTINGS = {"protocol": {"predictions": 10, "seeds": [0, 1]}, "models": {"defended": {"seed": None}}, "tasks": TASKS}


def test_settings_are_noted_once_and_compared_afterwards(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path)
    assert store.settings() is None
    store.begin(SETTINGS)
    assert store.settings() == {"format": FORMAT, **SETTINGS}
    noted = (tmp_path / "settings.json").read_bytes()
    reordered = {"models": {"defended": {"seed": None}}, "protocol": {"seeds": (0, 1), "predictions": 10}}
    store.begin({"tasks": TASKS, **reordered})
    assert (tmp_path / "settings.json").read_bytes() == noted


def test_other_settings_are_refused_and_each_difference_is_named(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path)
    store.begin(SETTINGS)
    store.write(UNIT, LINES, {})
    noted = (tmp_path / "settings.json").read_bytes()
    changed = {"protocol": {"predictions": 20, "seeds": [0]}, "models": {"defended": {}}, "new": 1}
    with pytest.raises(EvaluationError) as caught:
        store.begin({**changed, "tasks": {"defended/apgd": {}}})
    assert str(caught.value) == (
        f"{tmp_path} holds results of another evaluation:\n"
        "  seed: None before, not given now\n"
        "  new: not given before, 1 now\n"
        "  predictions: 10 before, 20 now\n"
        "  seeds: [0, 1] before, [0] now\n"
        "  defended/pgd: given before, not given now\n"
        "Give the same settings to go on with it, or another folder."
    )
    assert (tmp_path / "settings.json").read_bytes() == noted


def test_tasks_may_be_added_and_are_noted_by_the_first_process(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path)
    store.begin(SETTINGS)
    more = SETTINGS | {"tasks": TASKS | {"defended/apgd": {"steps": 3}}}
    store.compare(more)
    with pytest.raises(EvaluationError, match="not the folder of the first process"):
        store.begin(more, first=False)
    assert store.settings() == {"format": FORMAT, **SETTINGS}
    store.begin(more)
    assert store.settings() == {"format": FORMAT, **more}


def test_a_task_of_which_nothing_is_done_may_change_or_go(tmp_path: Path) -> None:
    """As where an attack has failed; once a work unit is done it stays."""
    store = ResultsFolder(tmp_path)
    attacks = {"defended/apgd": {"steps": 3}}
    store.begin(SETTINGS | {"tasks": TASKS | attacks})
    store.begin(SETTINGS)
    assert store.settings() == {"format": FORMAT, **SETTINGS}
    store.begin(SETTINGS | {"tasks": {"defended/pgd": {"steps": 3}}})
    store.write(UNIT, LINES, {})
    with pytest.raises(EvaluationError, match="steps: 3 before, 2 now"):
        store.begin(SETTINGS)
    with pytest.raises(EvaluationError, match="defended/pgd: given before, not given now"):
        store.begin(SETTINGS | {"tasks": attacks})


def test_what_was_written_about_other_tasks_is_removed(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path)
    store.begin(SETTINGS)
    for name in WRITTEN:
        (tmp_path / name).write_text("of pgd alone")
    store.begin(SETTINGS)
    assert files(tmp_path) == sorted([*WRITTEN, "settings.json"])
    store.begin(SETTINGS | {"tasks": TASKS | {"defended/apgd": {"steps": 3}}})
    assert files(tmp_path) == ["settings.json"]


def test_differences_that_follow_from_the_attacks_say_so(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path)
    tasks = {"checks/steps-2": {"eot": 1}, "defended/clean": {"search": 2}}
    store.begin(SETTINGS | {"tasks": tasks})
    for name in tasks:
        store.write(WorkUnit(name, 0, 0), LINES, {})
    for changed in ({"checks/steps-2": {"eot": 4}}, {"defended/clean": {"search": 3}}):
        with pytest.raises(EvaluationError, match="This follows from the attacks"):
            store.compare(SETTINGS | {"tasks": tasks | changed})
    with pytest.raises(EvaluationError, match=r"another folder\.$"):
        store.compare(SETTINGS | {"tasks": tasks, "protocol": {}})


def test_a_task_whose_results_are_deleted_as_the_message_says_may_go(tmp_path: Path) -> None:
    """As an attack that fails at some image, of which other images have results."""
    store = ResultsFolder(tmp_path)
    store.begin(SETTINGS | {"tasks": TASKS | {"defended/failing": {}}})
    store.write(WorkUnit("defended/failing", 0, 0), LINES, {})
    with pytest.raises(EvaluationError, match="defended/failing: given before, not given now") as caught:
        store.begin(SETTINGS)
    shutil.rmtree(str(caught.value).rpartition("delete ")[2].removesuffix("."))
    store.begin(SETTINGS)
    assert store.settings() == {"format": FORMAT, **SETTINGS}


@pytest.mark.parametrize("content", ['{"format": 1, "prot', "", "\x00" * 40])
def test_damaged_settings_are_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"settings\.json is not what an evaluation writes"):
        ResultsFolder(tmp_path).settings()
    with pytest.raises(EvaluationError, match=r"settings\.json is not what an evaluation writes"):
        ResultsFolder(tmp_path).begin(SETTINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is not that of an evaluation"),
        ("null", "is not that of an evaluation"),
        ('{"format": 1, "settings": {}, "model": {}}', "is not that of an evaluation"),  # of a certification
        ('{"format": 1, "tasks": {}}', "was written by another version of this package"),
    ],
)
def test_settings_of_something_else_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        ResultsFolder(tmp_path).begin(SETTINGS)


def test_results_whose_settings_were_removed_are_not_gone_on_with(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path)
    store.begin(SETTINGS)
    store.write(UNIT, LINES, {})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(EvaluationError, match=r"holds units of something else, or settings\.json has been removed"):
        store.begin(SETTINGS)


def test_the_folder_of_a_comparison_is_refused(tmp_path: Path) -> None:
    """What has settings of another kind in it is not taken for one."""
    other = tmp_path / "other" / "settings.json"
    other.parent.mkdir()
    other.write_text("{}")
    ResultsFolder(tmp_path).compare(SETTINGS)
    ResultsFolder(tmp_path / "one-step").begin(SETTINGS)
    earlier = json.loads((tmp_path / "one-step/settings.json").read_text()) | {"format": 1}
    (tmp_path / "one-step/settings.json").write_text(json.dumps(earlier))  # of another version of the package
    with pytest.raises(EvaluationError, match=r"holds evaluations, such as .*one-step: give another folder"):
        ResultsFolder(tmp_path).compare(SETTINGS)


@pytest.mark.parametrize(
    ("before", "now", "goes_on"),
    [(None, None, True), (None, "0.2", True), ("0.2", "0.2", True), ("0.2", "0.3", False), ("0.2", None, False)],
)
def test_a_library_of_attacks_may_be_installed_later(
    tmp_path: Path, before: str | None, now: str | None, goes_on: bool
) -> None:
    """But not changed once it was there."""
    store = ResultsFolder(tmp_path)
    store.begin(SETTINGS | {"computation": {"threads": 1, "pyautoattack": before}})
    store.write(UNIT, LINES, {})
    wanted = SETTINGS | {"computation": {"threads": 1, "pyautoattack": now}}
    if goes_on:
        store.begin(wanted)
        assert store.settings() == {"format": FORMAT, **wanted}
    else:
        with pytest.raises(EvaluationError, match=r"pyautoattack: 0\.2 before"):
            store.begin(wanted)


def test_timings_are_sums_by_task_over_all_ranks(tmp_path: Path) -> None:
    store = ResultsFolder(tmp_path)
    assert store.timings() == {}
    store.note_timing(WorkUnit("a", 0, 0), 0, Timing(3, 1.0, 10))
    store.note_timing(WorkUnit("a", 0, 1), 1, Timing(3, 2.0, 20))
    store.note_timing(WorkUnit("b", 0, 0), 1, Timing(3, 4.0, 40))
    assert store.timings() == {"a": Timing(6, 3.0, 30), "b": Timing(3, 4.0, 40)}
    store.note_timing(WorkUnit("a", 0, 1), 1, Timing(3, 5.0, 21))
    assert store.timings()["a"] == Timing(6, 6.0, 31)
