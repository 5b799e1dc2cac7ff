"""The command line, as people and machines meet it."""

import contextlib
import fcntl
import json
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmap_defense import __version__
from cmap_defense.cli.main import main
from cmap_defense.data import read_image
from cmap_defense.embedded import load_test_images

COMMAND = [sys.executable, "-m", "cmap_defense"]
TINY_TRAINING = [
    "--channels",
    "8,8",
    "--blocks",
    "1",
    "--batch-size",
    "8",
    "--checkpoint-every",
    "16",
    "--precision",
    "float32",
]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two image files: one of the backbone's size, one larger and in colour."""
    image = (load_test_images()[0][0, 0] * 255).byte().numpy()
    Image.fromarray(image).save(tmp_path / "boot.png")
    Image.fromarray(image).convert("RGB").resize((40, 50)).save(tmp_path / "large.jpg")
    return [tmp_path / "boot.png", tmp_path / "large.jpg"]


def test_demo_as_json(tmp_path: Path) -> None:
    done = run(
        "demo", "--images", "12", "--latents", "2", "--iterations", "25", "--out", "pictures", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr, "no progress bar in a pipe"
    answer = json.loads(done.stdout)
    for kind in ("bare", "purified"):
        for state in ("clean", "attacked"):
            low, high = answer["intervals"][kind][state]
            assert 0 <= low <= answer[kind][state] <= high <= 1
    assert answer["bare"]["attacked"] < 0.2 < answer["purified"]["attacked"], "the attacked classifier recovers"
    assert answer["settings"]["n_latents"] == 2
    assert answer["settings"]["iterations"] == 25
    assert answer["note"] == "the attacker did not know the defence"
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["latents.png", "sheet.png"]
    for path in answer["files"]:
        with Image.open(tmp_path / path) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("L").getcolors()) > 20, "something is drawn"


def test_demo_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["demo", "--images", "3", "--latents", "1", "--iterations", "2", "--eps", "8/255", "-o", str(tmp_path)])
        == 0
    )
    text = capsys.readouterr().out
    assert "the attacker did not know the defence" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["accuracy", "clean", "attacked"] in rows
    assert {row[0] for row in rows if len(row) == 7} == {"bare", "purified"}, "two rows of accuracy [low, high] pairs"


def test_purify_writes_a_file_of_the_same_name_and_size(
    tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["purify", *map(str, pictures), "-b", "fashion-mnist-ct", "-o", str(tmp_path / "out")]
    arguments += ["--resize", "bilinear", "--latents", "2", "--iterations", "3", "--all", "--json"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    names = ["boot-0.png", "boot-1.png", "boot.png", "large-0.png", "large-1.png", "large.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert sorted(Path(path).name for path in answer["files"]) == names
    best, *versions, large = (
        np.asarray(read_image(tmp_path / "out" / name, 1)[0])
        for name in ("boot.png", "boot-0.png", "boot-1.png", "large.png")
    )
    assert best.shape == (28, 28)
    assert large.shape == (50, 40)
    assert any(np.array_equal(best, version) for version in versions)
    assert not np.array_equal(*versions)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["purify", "boot.png", "-b", "fashion-mnist", "-o", "out"], 1, "fashion-mnist-ct"),
        (["purify", "large.jpg", "-b", "fashion-mnist-ct", "-o", "out"], 1, "--resize bilinear"),
        (["purify", "missing.png", "-b", "fashion-mnist-ct", "-o", "out"], 1, "missing.png"),
        (["purify", "boot.png", "boot.png", "-b", "fashion-mnist-ct", "-o", "out"], 1, "two images"),
        (["purify", "boot.png", "-b", "fashion-mnist-ct", "-o", "."], 1, "overwritten"),
        (["purify", "boot.png", "-b", "fashion-mnist-ct", "-o", "out", "--device", "cuda:99"], 2, "cuda:99"),
        (["purify", "-b", "fashion-mnist-ct", "-o", "out"], 2, "IMAGES"),
        (["demo", "--images", "0"], 2, "--images"),
        (["demo", "--eps", "8"], 2, "did you mean 8/255?"),
        (["demo", "--eps", "-0.1"], 2, "no size"),
        (["backbones", "info", "no-such-backbone"], 1, "fashion-mnist-ct"),
        (["train", "--data", "cifar", "-o", "out"], 1, "cifar10"),
        (["train", "--data", "data.npz", "-o", "out", "--attention", "7"], 2, "--attention"),
        (["train", "--data", "data.npz", "-o", "out", "--device", "cuda:99"], 2, "cuda:99"),
        (["demo", "-o", "boot.png/below"], 2, "cannot be written to"),
        (["dmeo"], 2, "dmeo"),
    ],
)
def test_mistakes_get_a_message_a_status_and_no_files(
    tmp_path: Path,
    pictures: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_backbones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "list"]) == 0
    assert "fashion-mnist-ct" in capsys.readouterr().out
    assert main(["backbones", "list", "--json"]) == 0
    assert "fashion-mnist-ct" in [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert main(["backbones", "info", "fashion-mnist-ct"]) == 0
    assert "image_shape: 1, 28, 28" in capsys.readouterr().out
    assert main(["backbones", "info", "fashion-mnist-ct", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_shape"] == [1, 28, 28]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in ("demo", "purify", "train", "backbones"))


def write_data(folder: Path) -> Path:
    path = folder / "data.npz"
    np.savez(path, images=np.random.RandomState(0).randint(0, 256, (40, 8, 12, 3)).astype(np.uint8))
    return path


def test_a_trained_backbone_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path)
    arguments = ["train", "--data", str(data), "--hold-out", "8", "--images", "32", "--name", "noise", "-o"]
    assert main([*arguments, str(tmp_path / "run"), *TINY_TRAINING, "--weights", "float16", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert main(["backbones", "info", answer["backbone"], "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["name"] == "noise"
    assert record["weights_dtype"] == "float16"
    assert record["image_shape"] == [3, 8, 12]
    assert record["training"]["images"] == 32
    assert record["training"]["images_seen"] == 32
    words = shlex.split(record["training"]["command"])
    assert words[:2] == ["cmap-defense", "train"]
    assert "--seed" in words
    assert main([*words[1:], "-o", str(tmp_path / "again")]) == 0
    again = tmp_path / "again" / "backbone" / "weights.safetensors"
    assert again.read_bytes() == (tmp_path / "run" / "backbone" / "weights.safetensors").read_bytes()
    Image.new("RGB", (12, 8)).save(tmp_path / "black.png")
    purified = ["purify", str(tmp_path / "black.png"), "-b", answer["backbone"], "-o", str(tmp_path / "out")]
    assert main([*purified, "--latents", "1", "--iterations", "2"]) == 0
    with Image.open(answer["samples"]) as sheet:
        assert sheet.size == (8 * 25 + 1, 8 * 17 + 1)


KILLED = """
import os, signal
from cmap_defense.cli.main import main
from cmap_defense.training import loop

def save(*arguments, done=[], keep=loop.save_checkpoint, **options):
    done.append(keep(*arguments, **options))
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

loop.save_checkpoint = save
main({arguments})
"""


def test_a_training_killed_in_the_middle_continues_to_the_same_weights(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    arguments = ["train", "--data", str(data), "--images", "64", *TINY_TRAINING, "-o"]
    assert run(*arguments, "straight", cwd=tmp_path).returncode == 0
    script = KILLED.format(arguments=[*arguments, "killed"])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("checkpoint-*[0-9]"))) == 2
    assert run(*arguments, "killed", cwd=tmp_path).returncode == 0
    for name in ("backbone/weights.safetensors", "backbone/backbone.json", "log.jsonl", "samples.png"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_other_settings_do_not_continue_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path)
    arguments = ["train", "--data", str(data), "--images", "16", *TINY_TRAINING, "-o", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert main([*arguments, "--seed", "1"]) == 1
    assert "seed: 0 before, 1 now" in capsys.readouterr().err


INTERRUPTED = """
import os, signal, sys
from PIL import Image
import cmap_defense.cli.demo, cmap_defense.evaluation.demo
from cmap_defense.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it

def interrupt(*arguments, **options):
    if {inside_a_file}:
        with open(arguments[1], "wb") as file:
            file.write(b"half")
    os.kill(os.getpid(), signal.SIGINT)

{what} = interrupt
sys.exit(main(["demo", "--images", "2", "--latents", "1", "--iterations", "2", "-o", "out"]))
"""


@pytest.mark.parametrize(
    ("what", "inside_a_file"), [("cmap_defense.evaluation.demo.PGD", False), ("Image.Image.save", True)]
)
def test_ctrl_c_ends_with_130_and_no_half_written_file(tmp_path: Path, what: str, inside_a_file: bool) -> None:
    script = INTERRUPTED.format(what=what, inside_a_file=inside_a_file)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted."
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a new terminal has no columns
    arguments = ["demo", "--images", "1", "--latents", "1", "--iterations", "2", "-o", "out"]
    process = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert process.wait() == 0
    assert b"it/s" in shown or b"s/it" in shown, "however fast it goes"


@pytest.mark.slow
def test_the_demo_without_arguments_recovers(tmp_path: Path) -> None:
    done = run("demo", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert answer["bare"]["attacked"] < 0.2
    assert answer["purified"]["attacked"] > answer["bare"]["attacked"] + 0.3


def test_other_data_do_not_continue_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path)
    arguments = ["train", "--data", str(data), "--images", "16", *TINY_TRAINING, "-o", str(tmp_path / "run")]
    assert main(arguments) == 0
    np.savez(data, images=np.zeros((40, 8, 12, 3), dtype=np.uint8))
    assert main(arguments) == 1
    assert "data.sha256" in capsys.readouterr().err
