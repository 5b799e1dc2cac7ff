"""The package as it is built, installed and described."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cmap_defense
from patience import HANGS
from processes import run_script

ROOT = Path(__file__).parent.parent
BACKBONE = ("backbone.json", "weights.safetensors")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed from a built wheel, without its dependencies."""
    work = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(work), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=HANGS)
    (wheel,) = work.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(work / "lib"), str(wheel)], check=True)
    return work / "lib"


def run_installed(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


CMAP = ["--images", "2", "--purifier", "cmap", "--n-latents", "1", "--iterations", "2"]


def test_a_built_wheel_installed_elsewhere_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    where = run_installed(installed, tmp_path, "-c", "import cmap_defense; print(cmap_defense.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed), where.stderr
    done = run_installed(installed, tmp_path, "-m", "cmap_defense", "demo", *CMAP)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "cmap-demo").iterdir()) == ["latents.png", "sheet.png"]


def test_the_wheel_has_licences_types_and_weights(installed: Path) -> None:
    package = installed / "cmap_defense"
    backbones = [f"{name}/{file}" for name in ("fashion-mnist-ct", "cifar10-ct-small") for file in BACKBONE]
    others = [
        "LICENSE.fashion-mnist",
        "LICENSE.cifar-resnet",
        "cifar10-adapted/adaptation.json",
        "fashion-mnist/classifier.safetensors",
        "fashion-mnist/test256.npz",
    ]
    for name in ("py.typed", *(f"assets/{asset}" for asset in (*others, *backbones))):
        assert (package / name).is_file(), name
    (metadata,) = installed.glob("cmap_defense-*.dist-info")
    assert (metadata / "licenses" / "LICENSE").is_file()


def test_importing_changes_no_global_state(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import logging, warnings, torch\n"
        "state = lambda: (torch.get_rng_state().sum().item(), torch.get_num_threads(), torch.is_grad_enabled(),"
        " torch.get_default_dtype(), len(logging.root.handlers), len(warnings.filters))\n"
        "import pytorch_msssim, safetensors.torch, huggingface_hub\n"
        "before = state()\n"
        "from cmap_defense import *\n"
        "assert state() == before, (state(), before)\n"
    )
    run_script(tmp_path / "script.py", cwd=tmp_path)


def imported_by(script: str) -> set[str]:
    """Modules that a process of its own has imported at the end of a script."""
    whole = f"{script}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "script",
    [
        "import cmap_defense",
        "import cmap_defense; dir(cmap_defense), cmap_defense.__version__",
        "from cmap_defense import CMAPSettings, CmapError, ThreatModel",
        "from cmap_defense.evaluation import Protocol, Subset",
        "from cmap_defense.training import TrainingConfig",
    ],
)
def test_neither_the_package_nor_settings_import_torch(script: str) -> None:
    assert not imported_by(script) & {"torch", "numpy", "huggingface_hub", "PIL"}


def test_public_names_are_imported_when_they_are_used() -> None:
    script = (
        "from cmap_defense import CMAP, PurifiedClassifier, attacks, evaluate, gradients, load_backbone, purifiers\n"
        "assert callable(evaluate) and attacks.PGD and gradients.Unrolled and purifiers.CMAP is CMAP\n"
    )
    assert "torch" in imported_by(script)


@pytest.mark.parametrize(
    "name", ["cmap_defense", "cmap_defense.cmap", "cmap_defense.evaluation", "cmap_defense.training"]
)
def test_public_names_are_there_and_documented(name: str) -> None:
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        value = getattr(package, public)
        assert value.__doc__ or not callable(value)
    with pytest.raises(AttributeError, match=rf"module '{name}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("folder", ["", "cmap", "evaluation", "training"])
def test_type_checkers_see_the_public_names(folder: str) -> None:
    tree = ast.parse((ROOT / "src" / "cmap_defense" / folder / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    package = importlib.import_module(f"cmap_defense.{folder}".rstrip("."))
    assert set(package.__all__) <= seen.keys()
    for name in package.__all__:
        module, _, attribute = seen[name].rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(package, name)


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


def test_it_can_be_imported_without_installed_metadata(tmp_path: Path) -> None:
    """From a copy of the sources, a zip or a frozen application."""
    script = (
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name == 'cmap-defense':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "import cmap_defense\n"
        "print(cmap_defense.__version__)\n"
    )
    source = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=source, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == cmap_defense.__version__, done.stderr


def test_the_wheel_has_the_version_of_the_package(installed: Path) -> None:
    (metadata,) = installed.glob("cmap_defense-*.dist-info")
    assert metadata.name == f"cmap_defense-{cmap_defense.__version__}.dist-info"


def test_every_dependency_has_a_lowest_version_that_ci_takes() -> None:
    script = [sys.executable, str(ROOT / ".ci" / "lowest.py")]
    done = subprocess.run([*script, "dev", "quality"], capture_output=True, text=True, check=True)
    pins = dict(line.split("==") for line in done.stdout.splitlines())
    declared = re.findall(r'^ *"([a-z-]+)>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert len(declared) > 15
    assert {name: version for name, version in declared if pins.get(name) != version} == {}
    done = subprocess.run([*script, "--without", "torch"], capture_output=True, text=True, check=True)
    assert "torch==" not in done.stdout
    assert "pillow==" in done.stdout
