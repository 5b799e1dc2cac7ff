"""Files that are whole or not there; and what differs between settings: one line per option, for every change."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.common.files import differences, refuse_other_settings, write_text
from cmap_defense.errors import EvaluationError

LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-1, 1) | st.text("ab.", max_size=2)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab.", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(value=VALUES)
def test_nothing_differs_from_itself(value: Any) -> None:
    assert differences(value, copy.deepcopy(value)) == []


@given(before=VALUES, now=VALUES)
def test_there_are_differences_where_values_differ_and_only_there(before: Any, now: Any) -> None:
    found = differences(before, now)
    assert (found == []) == (before == now)
    assert len(differences(now, before)) == len(found)
    for line in found:
        old, new = line.partition(": ")[2].removesuffix(" now").split(" before, ")
        assert old != new


def test_every_change_has_its_place_and_both_values() -> None:
    before = {"a": {"b": 1, "c": [1, 2], "gone": None}, "d": "x", "same": {"e": 0}}
    now = {"a": {"b": 2, "c": [1, 3], "new": {"f": 1}}, "d": {"g": 1}, "same": {"e": 0}}
    assert differences(before, now) == [
        "a.b: 1 before, 2 now",
        "a.c: [1, 2] before, [1, 3] now",
        "a.gone: None before, not given now",
        "a.new: not given before, given now",
        "d: x before, given now",
    ]


def tasks(eps: float, steps: int = 5) -> dict[str, Any]:
    attack = {"class": "PGD", "threat": {"norm": "linf", "eps": eps}, "steps": steps}
    half = {**attack, "threat": {"norm": "linf", "eps": eps / 2}}
    found = {f"defended/{name}": {"settings": attack} for name in ("pgd", "transfer")}
    return {"tasks": {**found, "undefended/pgd": {"settings": attack}, "checks/eps-0.5x": {"settings": half}}}


def test_an_option_that_changed_alike_everywhere_has_one_line() -> None:
    before, now = tasks(8 / 255), tasks(4 / 255)
    assert differences(before, now, derived=["checks/"]) == ["eps: 8/255 before, 4/255 now"]
    assert differences(tasks(0.05), tasks(0.04, 6), derived=["checks/"]) == [
        "steps: 5 before, 6 now",
        "eps: 0.05 before, 0.04 now",
    ]


def test_an_option_that_changed_differently_has_a_line_for_each_place() -> None:
    before, now = tasks(8 / 255), tasks(4 / 255)
    now["tasks"]["undefended/pgd"] = tasks(2 / 255)["tasks"]["undefended/pgd"]
    assert differences(before, now, derived=["checks/"]) == [
        "tasks.defended/pgd.settings.threat.eps: 8/255 before, 4/255 now",
        "tasks.defended/transfer.settings.threat.eps: 8/255 before, 4/255 now",
        "tasks.undefended/pgd.settings.threat.eps: 8/255 before, 2/255 now",
    ]


def test_what_follows_from_others_is_named_where_nothing_else_differs() -> None:
    before, now = tasks(0.1), tasks(0.1)
    now["tasks"]["checks/eps-0.5x"] = {"settings": {"steps": 7}}
    assert "steps: 5 before, 7 now" in differences(before, now, derived=["checks/"])


def test_checksums_are_short_and_logits_are_compared_as_numbers() -> None:
    before = {"models": {"defended": {"backbone": {"weights": "5e" * 32}, "logits": [1.0, -2.0]}}}
    now = {"models": {"defended": {"backbone": {"weights": "7f" * 32}, "logits": [1.001, -2.001]}}}
    assert differences(before, now) == ["backbone.weights: 5e5e5e5e5e5e... before, 7f7f7f7f7f7f... now"]
    now["models"]["defended"]["logits"] = [1.5, -2.0]
    assert len(differences(before, now)) == 2


LONG = st.text("ab'", max_size=3).map(lambda text: 40 * text) | st.text("ab'\\", max_size=300)


@given(parts=st.tuples(LONG, LONG, LONG, LONG))
def test_long_texts_are_cut_down_to_where_they_differ(parts: tuple[str, str, str, str]) -> None:
    """What is shown of them differs, and is not long where the difference is not."""
    begin, one, other, end = parts
    before, now = begin + one + end, begin + other + end
    found = differences({"a": before}, {"a": now})
    if before == now:
        assert found == []
        return
    there, here = found[0].removeprefix("a: ").removesuffix(" now").split(" before, ")
    assert there != here
    for shown, whole, own in ((there, before, one), (here, now, other)):
        text = shown.removeprefix("...").removesuffix("...")
        assert text in whole or text in repr(whole)
        assert len(shown) <= max(2 * len(own) + 150, 200)


def test_a_refusal_has_what_is_there_a_line_per_option_and_what_to_do() -> None:
    before, now = ({"train": {f"o{n:02}": n * sign for n in range(1, 16)}} for sign in (1, -1))
    with pytest.raises(EvaluationError) as caught:
        refuse_other_settings(before, now, EvaluationError, what="This is there", remedy="Do that.")
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["This is there:", "  o01: 1 before, -1 now"]
    assert lines[12:] == ["  o12: 12 before, -12 now", "  and 3 more", "Do that."]
    refuse_other_settings({"a": [1, 2]}, {"a": (1, 2)}, EvaluationError, what="", remedy="")


def failing(*_: Any, **__: Any) -> None:
    raise OSError("the disk is full")


@pytest.mark.parametrize("fails", ["os.fsync", "pathlib.Path.replace"])
def test_a_text_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "made" / "text"
    write_text(path, "before")
    with monkeypatch.context() as patched:
        patched.setattr(fails, failing)
        with pytest.raises(OSError, match="full"):
            write_text(path, "afterwards, and longer")
    assert path.read_text() == "before"
    write_text(path, "later")
    assert path.read_text() == "later"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["text"]
