"""``cmap-defense purify``: files and folders of images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmap_defense.backbones.registry import registry_entry
from cmap_defense.data import read_image
from cmap_defense.embedded import load_test_images

from .conftest import Run

TINY = ["--n-latents", "2", "--iterations", "3", "--purifier", "cmap", "--json"]


def save(number: int, path: Path) -> Path:
    """An embedded image as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((load_test_images()[0][number, 0] * 255).round().byte().numpy()).save(path)
    return path


@pytest.mark.parametrize(
    "method", [["--purifier", "cmap", "--iterations", "3"], [], ["-b", "fashion-mnist-edm", "--purifier", "one-step"]]
)
def test_files_of_the_same_name_and_size_are_written(tmp_path: Path, run: Run, method: list[str]) -> None:
    boot = save(0, tmp_path / "boot.png")
    with Image.open(boot) as image:
        image.convert("RGB").resize((40, 50)).save(tmp_path / "large.jpg")
    given = [boot, tmp_path / "large.jpg", "--resize", "bilinear", "--all", "--json", "-o", tmp_path / "out"]
    found = json.loads(run("purify", *given, "-b", "fashion-mnist-ct", "--n-latents", 2, *method))
    assert found["purifier"] == ("cmap" if "cmap" in method else "one-step")
    names = ["boot-0.png", "boot-1.png", "boot.png", "large-0.png", "large-1.png", "large.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert sorted(Path(path).name for path in found["files"]) == names
    assert found["settings"]["n_latents"] == 2
    best, *versions, large = (
        np.asarray(read_image(tmp_path / "out" / name, 1)[0])
        for name in ("boot.png", "boot-0.png", "boot-1.png", "large.png")
    )
    assert best.shape == (28, 28)
    assert large.shape == (50, 40)
    assert any(np.array_equal(best, version) for version in versions)
    assert not np.array_equal(*versions)


def test_two_backbones(tmp_path: Path, run: Run) -> None:
    """In any order; each purifier of the chain takes its own."""
    image, parts = save(0, tmp_path / "boot.png"), "purifiers=diffpure t=10 step=0.01, cmap n_latents=2 iterations=1"
    found = []
    for first, second in (("fashion-mnist-ct", "fashion-mnist-edm"), ("fashion-mnist-edm", "fashion-mnist-ct")):
        given = ["-b", first, "-b", second, "--purifier", "chain", "--purifier-set", parts]
        printed = json.loads(run("purify", image, *given, "--all", "--json", "-o", tmp_path / first))
        assert printed["backbone"] == [first, second]
        assert [part["purifier"] for part in printed["settings"]["purifiers"]] == ["diffpure", "cmap"]
        found.append([Path(path).read_bytes() for path in printed["files"]])
    assert len(found[0]) == 3
    assert found[0] == found[1]
    assert "fashion-mnist-ct with fashion-mnist-edm is not class-conditional" in run(
        "purify", image, *given[2:4], *given[:2], "--class-label", 3, "-o", tmp_path / "none", status=2
    )


def test_settings_of_the_purifier(tmp_path: Path, run: Run) -> None:
    given = ["--purifier-set", "latent_weight=0.5", "--purifier-set", "betas=0.8,0.9", "--learning-rate", "1/20"]
    image = save(0, tmp_path / "boot.png")
    found = json.loads(run("purify", image, "-b", "fashion-mnist-ct", *TINY, *given, "-o", tmp_path / "out"))
    expected = {"n_latents": 2, "iterations": 3, "latent_weight": 0.5, "betas": [0.8, 0.9], "learning_rate": 0.05}
    assert expected.items() <= found["settings"].items()


def test_the_preset_of_a_record(tmp_path: Path, run: Run) -> None:
    """Of the commands that have a classifier as well."""
    folder = tmp_path / "backbone"
    shutil.copytree(registry_entry("fashion-mnist-ct").sources[0].folder, folder)  # pyright: ignore[reportAttributeAccessIssue]
    place = folder / "backbone.json"
    record = json.loads(place.read_text()) | {"presets": {"fast": {"purifier": "one-step", "n_latents": 3}}}
    place.write_text(json.dumps(record))
    given = ["-b", folder, "--purifier-preset", "fast", "--json", "-o", tmp_path / "out"]
    found = json.loads(run("purify", save(0, tmp_path / "boot.png"), *given))
    assert (found["purifier"], found["settings"]["n_latents"]) == ("one-step", 3)
    expected = run("evaluate", "-c", "embedded", "-d", "embedded", "-n", 2, "--attacks", "none", "--dry-run", *given)
    assert json.loads(expected)["passes"]["defended/clean"] == 2 * 3 * 30  # images, K, predictions


def test_folders(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of the same names are written, so that they can be evaluated; in groups, as if all were one."""
    monkeypatch.setattr("cmap_defense.cli.purify.GROUP", 3)
    folder = tmp_path / "data"
    names = [Path("a/0.png"), Path("a/1.png"), Path("b/2.png"), Path("b/3.png")]
    for number, name in enumerate(names):
        save(number, folder / name)
    save(0, folder / ".ipynb_checkpoints" / "0.png").write_bytes(b"damaged")
    (folder / "notes.txt").write_text("not an image")
    options = ["-b", "fashion-mnist-ct", "--n-latents", 1, "--json"]
    for _ in range(2):  # what the first call wrote is not purified by the second
        found = json.loads(run("purify", folder, *options, "-o", folder / "purified"))
        assert sorted(Path(file).relative_to(folder / "purified") for file in found["files"]) == names
        assert len(found["mismatch"]) == len(names)
    run("purify", folder / names[-1], *options, "-o", tmp_path / "alone")
    alone, together = tmp_path / "alone" / names[-1].name, folder / "purified" / names[-1]
    assert np.array_equal(read_image(alone, 1), read_image(together, 1))


@pytest.mark.parametrize(("names", "more"), [(["a", "a-0"], ["--all"]), (["a", "A"], [])])
def test_no_file_is_written_twice(tmp_path: Path, run: Run, names: list[str], more: list[str]) -> None:
    """Also where a system takes large and small letters for the same."""
    given = [save(number, tmp_path / str(number) / f"{name}.png") for number, name in enumerate(names)]
    error = run("purify", *given, *more, "-b", "fashion-mnist-ct", *TINY, "-o", tmp_path / "out", status=1)
    assert "two images would be written to" in error
    assert not (tmp_path / "out").exists()
