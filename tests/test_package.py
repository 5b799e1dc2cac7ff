"""The package as it is built, installed and described."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cmap_defense

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed from a built wheel, without its dependencies."""
    work = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(work), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=300)
    (wheel,) = work.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(work / "lib"), str(wheel)], check=True)
    return work / "lib"


def run_installed(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_a_built_wheel_installed_elsewhere_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    where = run_installed(installed, tmp_path, "-c", "import cmap_defense; print(cmap_defense.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed), where.stderr
    done = run_installed(
        installed, tmp_path, "-m", "cmap_defense", "demo", "--images", "2", "--latents", "1", "--iterations", "2"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "cmap-demo").iterdir()) == ["latents.png", "sheet.png"]


def test_the_wheel_has_licences_types_and_weights(installed: Path) -> None:
    package = installed / "cmap_defense"
    for name in (
        "py.typed",
        "assets/LICENSE.fashion-mnist",
        "assets/fashion-mnist/classifier.safetensors",
        "assets/fashion-mnist/test256.npz",
        "assets/fashion-mnist-ct/backbone.json",
        "assets/fashion-mnist-ct/weights.safetensors",
        "assets/cifar10-ct-small/backbone.json",
        "assets/cifar10-ct-small/weights.safetensors",
    ):
        assert (package / name).is_file(), name
    (metadata,) = installed.glob("cmap_defense-*.dist-info")
    assert (metadata / "licenses" / "LICENSE").is_file()


def test_importing_changes_no_global_state() -> None:
    script = (
        "import logging, warnings, torch\n"
        "state = lambda: (torch.get_rng_state().sum().item(), torch.get_num_threads(), torch.is_grad_enabled(),"
        " torch.get_default_dtype(), len(logging.root.handlers), len(warnings.filters))\n"
        "import pytorch_msssim, safetensors.torch, huggingface_hub\n"
        "before = state()\n"
        "import cmap_defense\n"
        "assert state() == before, (state(), before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_and_documented() -> None:
    for name in cmap_defense.__all__:
        assert getattr(cmap_defense, name).__doc__


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) == 2, "the README has two commands, the demo and the tests"
    assert commands[0].endswith("cmap-defense demo")
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_all_errors_are_cmap_errors_and_builtins() -> None:
    from cmap_defense import errors

    for name in errors.__all__:
        kind = getattr(errors, name)
        if name.endswith("Warning"):
            assert issubclass(kind, UserWarning)
            continue
        assert issubclass(kind, errors.CmapError)
        if kind is not errors.CmapError:
            assert len(kind.__mro__) > 4, f"{name} derives from a builtin besides"
