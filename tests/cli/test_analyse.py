"""``cmap-defense analyse``, as people and machines meet it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmap_defense.cli.commands.analyse import analyse
from cmap_defense.cli.main import cli, main
from cmap_defense.detection import KINDS

TINY = [
    "analyse",
    "-n",
    "3",
    "--reference",
    "4",
    "--levels",
    "2",
    "--steps",
    "2",
    "--latents",
    "2",
    "--iterations",
    "2",
]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.commands, "analyse", analyse)


def test_as_text_with_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main([*TINY, "--threads", "1", "-o", str(tmp_path / "out")]) == 0
    assert torch.get_num_threads() == threads
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    for name in KINDS:
        assert any(line.startswith(name.replace("_", " ")) for line in lines)
    assert "K = 2 latents, N = 2 iterations" in captured.out
    assert "- adversarial images can" in captured.out
    assert "told from noisy ones with AUROC" in captured.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detection.json", "detection.png"]
    told = json.loads((tmp_path / "out" / "detection.json").read_text(encoding="utf-8"))
    assert {kind["count"] for kind in told["kinds"].values()} == {3}
    assert told["references"] == 4
    with Image.open(tmp_path / "out" / "detection.png") as picture:
        assert picture.size[0] == 1600


def test_as_json_with_the_deep_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--kernel", "deep", "--training", "4", "--no-purify", "--json", "-o", str(tmp_path)]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kernel"]["name"] == "deep"
    assert list(told["kinds"]) == list(KINDS[:4])
    assert told["settings"]["n_latents"] == 2
    assert len(told["eps"]["sigmas"]) == 2
    assert told["lacking"] is None
    assert [Path(path).name for path in told["files"]] == ["detection.json", "detection.png"]


def test_without_matplotlib_the_numbers_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, "--no-purify", "-o", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "cmap-defense[report]" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["detection.json"]


def test_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (9, 28, 28), dtype=np.uint8), generator.integers(0, 10, 9)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    assert main([*TINY, "--no-purify", "-d", str(tmp_path / "data.npz"), "--json", "-o", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["references"] == 4
    assert main([*TINY, "-d", str(tmp_path / "data.npz"), "--reference", "7", "-o", str(tmp_path / "none")]) == 2
    assert "There are 9 images, but 3 + 7 are wanted" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-n", "200"], 2, "There are 256 images, but 200 + 128 are wanted"),
        (["-n", "100", "--kernel", "deep"], 2, "100 + 128 + 64"),
        (["--eps", "0"], 2, "--eps"),
        (["--eps", "8"], 2, "did you mean 8/255?"),
        (["--levels", "1001"], 2, "--levels"),
        (["--kernel", "linear"], 2, "--kernel"),
        (["--backbone", "fashion-mnist"], 1, "fashion-mnist-ct"),
        (["--classifier", "nowhere"], 2, "--classifier"),
        (["--data", "nothing-there"], 1, "nothing-there"),
    ],
)
def test_mistakes_get_a_message_a_status_and_no_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(["analyse", *arguments, "-o", str(tmp_path / "out")]) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", "--help"]) == 0
    assert "fashion-mnist-ct" in capsys.readouterr().out
