"""Differences image by image: a known answer, laws, and what is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmap_defense.common.statistics import mean_interval
from cmap_defense.errors import EvaluationError
from cmap_defense.evaluation import paired_differences
from cmap_defense.evaluation.differences import differences_table

LABELS = (1, 0, 2, 1)


def written(folder: Path, right: Mapping[str, Sequence[Sequence[bool]]], labels: Sequence[int] = LABELS) -> Path:
    """A folder of results: by attack and image, which of its re-evaluations are right; the predictions are as many."""
    lines: list[dict[str, Any]] = []
    for attack, images in right.items():
        for image, (label, found) in enumerate(zip(labels, images, strict=True)):
            classes = [label if correct else label + 1 for correct in found]
            same = {"model": "defended", "attack": attack, "seed": 0, "image": image, "label": label}
            lines.append(same | {"predictions": classes, "reevaluated": classes, "one_latent": None})
    lines.append(lines[0] | {"model": "undefended", "reevaluated": [9, 9]})
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


YES, HALF, NO = (True, True), (True, False), (False, False)


def test_a_known_answer(tmp_path: Path) -> None:
    a = written(tmp_path / "a", {"clean": [YES, YES, YES, NO], "pgd": [YES, HALF, NO, NO], "apgd": [NO, YES, NO, NO]})
    b = written(tmp_path / "b", {"clean": [YES, YES, NO, NO], "pgd": [NO, NO, NO, NO], "apgd": [NO, NO, NO, HALF]})
    found = {gap.attack: gap for gap in paired_differences({"a": a, "b": b})}
    assert list(found) == ["clean", "pgd", "apgd", "worst of these"]
    assert found["clean"].value == 0.25
    assert found["pgd"].value == (1 + 0.5) / 4
    assert found["apgd"].value == (1 - 0.5) / 4
    assert found["worst of these"].value == 0.5 / 4, "in a the first image falls to apgd, the second half to pgd"
    deviation = torch.tensor([1, 0.5, 0, 0]).std().item()
    assert found["pgd"].half_width == pytest.approx(3.182 * deviation / 2, rel=0.01), "Student's t of 3 degrees"
    assert differences_table([found["worst of these"], found["clean"]]) == [
        ["first", "second", "clean", "worst of these"],
        ["a", "b", str(found["clean"]), str(found["worst of these"])],
    ]


def test_the_worst_is_that_of_one_attack_where_it_is_lower(tmp_path: Path) -> None:
    """The predictions choose pgd on each image, and the re-evaluations find apgd the worse."""
    a = written(tmp_path / "a", {"clean": [YES] * 4, "pgd": [NO] * 4, "apgd": [YES] * 4})
    lines = [json.loads(line) for line in (a / "results.jsonl").read_text().splitlines()]
    for line in lines:
        line["reevaluated"] = line["reevaluated"] if line["attack"] == "clean" else [9, line["label"]]
        line["reevaluated"] = [9, 9] if line["attack"] == "apgd" else line["reevaluated"]
    (a / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    b = written(tmp_path / "b", {"clean": [YES] * 4, "pgd": [YES] * 4, "apgd": [YES] * 4})
    found = {gap.attack: gap.value for gap in paired_differences({"a": a, "b": b})}
    assert found["pgd"] == -0.5
    assert found["apgd"] == found["worst of these"] == -1.0


def test_each_two_defences_on_what_both_have(tmp_path: Path) -> None:
    a = written(tmp_path / "a", {"clean": [YES] * 4, "pgd": [NO] * 4, "apgd": [NO] * 4})
    b = written(tmp_path / "b", {"clean": [YES, NO], "apgd": [YES, YES]}, LABELS[:2])
    c = written(tmp_path / "c", {"clean": [NO] * 4})
    found = paired_differences({"a": a, "b": b, "c": c})
    pairs = [(gap.first + gap.second, gap.attack, gap.images, gap.value) for gap in found]
    assert pairs == [
        ("ab", "clean", 2, 0.5),
        ("ab", "apgd", 2, -1.0),
        ("ac", "clean", 4, 1.0),
        ("bc", "clean", 2, 0.5),
    ]
    assert differences_table(found)[2] == ["a", "c", "+1.000 on each", ""]


def test_images_are_paired_by_their_positions_and_runs_are_averaged(tmp_path: Path) -> None:
    def folder(name: str, right: Mapping[int, tuple[int, int]]) -> Path:
        """By image, whether its prediction is right in the first run and in the second."""
        same = {"model": "defended", "attack": "clean", "label": 1, "predictions": [1], "one_latent": None}
        lines = [
            same | {"seed": seed, "image": image, "reevaluated": [1 if found[seed] else 9]}
            for seed in (0, 1)
            for image, found in right.items()
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    one, other = folder("a", {7: (1, 1), 3: (1, 0), 5: (0, 0)}), folder("b", {5: (0, 0), 7: (1, 0)})
    (gap,) = paired_differences({"a": one, "b": other})
    assert (gap.images, gap.value) == (2, 0.25)


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    a = written(tmp_path / "a", {"clean": [YES] * 4})
    b = written(tmp_path / "b", {"clean": [YES] * 4}, (1, 0, 2, 0))
    with pytest.raises(EvaluationError, match=r"a and b have no images in common.*same data"):
        paired_differences({"a": a, "b": b})
    with pytest.raises(EvaluationError, match=r"results\.jsonl, which a finished evaluation writes"):
        paired_differences({"a": a, "nothing": tmp_path / "nothing"})


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40))
def test_the_interval_is_symmetric_and_shrinks_with_the_images(values: list[float]) -> None:
    gaps = torch.tensor(values, dtype=torch.float64)
    mean, half = mean_interval(gaps)
    opposite, same = mean_interval(-gaps)
    assert opposite == pytest.approx(-mean)
    assert (half is None) == (same is None) == (gaps.std().item() == 0)
    if half is None:
        return
    assert same == pytest.approx(half)
    _, less = mean_interval(gaps.repeat(4))
    assert less is not None
    assert less <= half + 1e-12


@pytest.mark.parametrize("count", [1, 2, 8])
def test_there_is_no_interval_where_all_images_agree(count: int) -> None:
    """Of width 0 it would say that the difference is known for certain."""
    assert mean_interval(torch.full((count,), 0.5)) == (0.5, None)
