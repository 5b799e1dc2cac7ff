"""``cmap-defense demo``."""

import json
import sys
import webbrowser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmap_defense.cli import demo
from cmap_defense.cli.main import main
from cmap_defense.cmap.voting import count_votes, majority_label
from cmap_defense.data import files
from cmap_defense.results import PurificationResult
from toys import noise

from .conftest import Run

TINY = ["demo", "--images", "3", "--purifier", "cmap", "--n-latents", "1", "--iterations", "2"]


def test_the_attacked_classifier_recovers_and_pictures_show_it(tmp_path: Path, run: Run) -> None:
    given = ["--purifier", "cmap", "--n-latents", 1, "--iterations", 20]
    found = json.loads(run("demo", "--images", 6, *given, "--json", "-o", tmp_path))
    for kind in ("undefended", "purified"):
        assert list(found[kind]) == ["clean", "attacked"]
        for state in found[kind]:
            low, high = found["intervals"][kind][state]
            assert 0 <= low <= found[kind][state] <= high <= 1
    assert found["undefended"]["attacked"] < 0.2 < found["purified"]["attacked"]
    assert (found["settings"]["n_latents"], found["settings"]["iterations"]) == (1, 20)
    assert found["note"] == "the attacks did not know the defence."
    assert [Path(path).name for path in found["files"]] == ["sheet.png", "latents.png"]
    for path in found["files"]:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("L").getcolors()) > 20, "something is drawn"


def test_as_text(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    text = run(*TINY, "--eps", "8/255", "-o", tmp_path, "--open")
    assert opened == [(tmp_path / name).as_uri() for name in ("sheet.png", "latents.png")]
    assert "the attacks did not know the defence" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["accuracy", "clean", "attacked"] in rows
    assert {row[0] for row in rows if len(row) == 7} == {"undefended", "purified"}, (
        "two rows of accuracy [low, high] pairs"
    )


def test_without_matplotlib_there_is_a_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, "-o", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert error.startswith("No latents.png: this needs matplotlib")
    assert "pip install 'cmap-defense[report]'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@given(count=st.integers(1, 30), n_latents=st.integers(1, 6), shown=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_what_is_shown_is_right_as_often_as_all_are(count: int, n_latents: int, shown: int, seed: int) -> None:
    logits, labels = 2 * noise(count, n_latents, 3, seed=seed), torch.arange(count) % 3
    votes = {"logits": logits, "votes": count_votes(logits), "labels": majority_label(logits)}
    rows = demo.over_margin(PurificationResult(logits, logits, **votes), labels, min(shown, count))
    assert len(set(rows.tolist())) == min(shown, count)
    right = votes["labels"] == labels
    assert abs(right[rows].double().mean() - right.double().mean()) <= 1 / min(shown, count) + 1e-9


def interrupt(*arguments: object, **options: object) -> None:
    """Ctrl-C, of a file in the middle of its writing."""
    for path in arguments:
        if isinstance(path, Path):
            path.write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("owner", "name"), [(demo, "PGD"), (files.Image.Image, "save"), (demo, "image_sheet")])
def test_ctrl_c_ends_with_130_and_no_half_written_file(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    monkeypatch.setattr(owner, name, interrupt)
    assert run(*TINY, "-o", tmp_path, status=130) == "Interrupted."
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_denoises_is_attacked_through_its_own_gradient(tmp_path: Path, run: Run) -> None:
    found = json.loads(run("demo", "--images", 8, "--steps", 5, "--n-latents", 2, "--json", "-o", tmp_path))
    assert (found["purifier"], found["settings"]["n_latents"]) == ("one-step", 2)
    assert list(found["purified"]) == ["clean", "attacked", "adaptive"]
    assert found["purified"]["adaptive"] < found["purified"]["clean"]
    assert found["predictions"] == 4
    votes = {name: 32 * share for name, share in found["purified"].items()}
    assert all(count == int(count) for count in votes.values()), "four predictions of eight images"
    assert any(count % 4 for count in votes.values()), "which differ in their noise"
    assert found["undefended"]["attacked"] < found["undefended"]["adaptive"], "it was made for another model"
    assert [Path(path).name for path in found["files"]] == ["sheet.png"]


@pytest.mark.slow
def test_the_demo_without_arguments_recovers(tmp_path: Path, run: Run) -> None:
    found = json.loads(run("demo", "--json", "-o", tmp_path))
    assert found["undefended"]["attacked"] < 0.2
    assert found["purified"]["attacked"] > found["undefended"]["attacked"] + 0.3
