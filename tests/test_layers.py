"""Imports go to lower layers only, and packages of one layer do not import each other (the table of docs/design.md)."""

import ast
from pathlib import Path

import pytest

PACKAGE = "cmap_defense"
SOURCE = Path(__file__).parent.parent / "src" / PACKAGE

ORDER = [
    "cifar_resnet common embedded errors plots results threat",
    "backbones cmap data",
    "gradients purifiers",
    "classifier",
    "attacks certification",
    "detection evaluation quality training",
    "adaptation paper",
    "cli",
]
LAYERS = {name: layer for layer, names in enumerate(ORDER) for name in names.split()}
"""Layer of every package; the files of layer 0, the shared basics, count as one."""

EXEMPT = ("__init__", "__main__")
"""The package's own __init__, which gathers the public names, and what ``python -m`` runs."""

PACKAGE_LAYER = 3
"""Layer of the package itself as something to import: it holds names of the classifier and of layers below it."""


def package_of(module: tuple[str, ...]) -> str | None:
    """The package of a module's name; None for cmap_defense itself and what runs it."""
    return None if not module or module[0] in EXEMPT else module[0]


def imports_of(source: str, module: tuple[str, ...], *, is_package: bool) -> list[tuple[int, tuple[str, ...]]]:
    """Line and imported module, inside the package, of every import in a file, wherever it stands.

    Args:
        source: the file's text.
        module: its dotted name below the package, as a tuple.
        is_package: whether it is an ``__init__.py``.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            here = [PACKAGE, *module] if is_package else [PACKAGE, *module][:-1]
            base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [[*node.module.split("."), alias.name] for alias in node.names]
        else:
            continue
        found += [(node.lineno, tuple(name[1:])) for name in names if name[0] == PACKAGE]
    return found


def violations(source: str, module: tuple[str, ...], *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one file."""
    own = package_of(module)
    if own is None:
        return []
    wrong = []
    for line, target in imports_of(source, module, is_package=is_package):
        other = _defined_in(target[0]) if target else ""
        shown = f"{'.'.join(module)}, line {line}: imports {'.'.join((PACKAGE, *target))}"
        layer = LAYERS.get(other, PACKAGE_LAYER)
        if layer > LAYERS[own]:
            wrong.append(f"{shown}, upward from layer {LAYERS[own]} to {layer}")
        elif layer == LAYERS[own] > 0 and other != own:
            wrong.append(f"{shown}, sideways on layer {LAYERS[own]}")
    return wrong


def _defined_in(name: str) -> str:
    """The package of a public name, which importing it from the package loads; other names are as they are."""
    source = (SOURCE / "__init__.py").read_text(encoding="utf-8")
    for _, target in imports_of(source, (), is_package=True):
        if len(target) > 1 and target[-1] == name:
            return target[0]
    return name


def modules() -> list[tuple[Path, tuple[str, ...], bool]]:
    """Path, name and whether it is a package, of every file of the source."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).with_suffix("").parts
        is_package = name[-1] == "__init__" and len(name) > 1
        found.append((path, name[:-1] if is_package else name, is_package))
    return found


@pytest.mark.parametrize(("path", "module", "is_package"), modules(), ids=[".".join(m[1]) for m in modules()])
def test_imports_go_downward_only(path: Path, module: tuple[str, ...], is_package: bool):
    assert violations(path.read_text(encoding="utf-8"), module, is_package=is_package) == []


def test_importing_the_package_loads_the_shared_basics_alone():
    package = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    at_once = "\n".join(ast.unparse(node) for node in package.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    packages = {target[0] for _, target in imports_of(at_once, (), is_package=True)}
    assert {LAYERS[package] for package in packages} == {0}


def test_every_package_has_a_layer():
    packages = {package for _, module, _ in modules() if (package := package_of(module)) is not None}
    assert packages <= LAYERS.keys()


def test_the_method_is_among_the_files_that_were_read():
    assert {("cmap", "optimise"), ("backbones",), ("classifier",), ("errors",)} <= {m for _, m, _ in modules()}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (("cmap", "losses"), "from cmap_defense.purifiers.cmap import CMAP"),
        (("cmap", "losses"), "from cmap_defense.backbones import load_backbone"),
        (("cmap", "losses"), "import cmap_defense.backbones.load"),
        (("cmap", "losses"), "from cmap_defense import backbones"),
        (("cmap", "losses"), "from cmap_defense import PurifiedClassifier"),
        (("cmap", "losses"), "import cmap_defense"),
        (("cmap", "losses"), "from ..backbones import load"),
        (("cmap", "losses"), "from .. import data"),
        (("cmap", "losses"), "def later():\n    from cmap_defense.cli import main"),
        (("purifiers", "cmap"), "from cmap_defense.gradients import Detached"),
        (("gradients",), "from .purifiers import CMAP"),
        (("errors",), "from cmap_defense.cmap import losses"),
        (("common", "rng"), "if TYPE_CHECKING:\n    from cmap_defense.classifier import PurifiedClassifier"),
        (("training", "loop"), "from cmap_defense.evaluation import report"),
        (("attacks", "base"), "from cmap_defense.evaluation import report"),
        (("data", "images"), "from cmap_defense.somewhere import thing"),
        (("backbones",), "from cmap_defense import __version__"),
        (("attacks",), "from cmap_defense import evaluate"),
    ],
)
def test_upward_and_sideways_imports_are_caught(module: tuple[str, ...], line: str):
    assert len(violations(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (("cmap", "losses"), "from cmap_defense.cmap.ssim import SSIMReference"),
        (("cmap", "losses"), "from .ssim import SSIMReference"),
        (("cmap", "losses"), "from ..errors import CmapError"),
        (("cmap", "losses"), "import torch, json\nfrom torch import Tensor\nfrom . import ssim"),
        (("purifiers", "cmap"), "from cmap_defense.cmap import losses\nfrom cmap_defense.backbones import base"),
        (("cli", "main"), "from cmap_defense.training import loop\nfrom cmap_defense.classifier import X"),
        (("threat",), "from cmap_defense.common.settings import Settings"),
        (("cli", "main"), "from cmap_defense import __version__"),
        (("attacks", "base"), "from cmap_defense import PurifiedClassifier"),
        (("cmap", "losses"), "from cmap_defense import CMAPSettings, CmapError, ThreatModel"),
        (("__init__",), "from cmap_defense.classifier import PurifiedClassifier"),
        (("__main__",), "from cmap_defense.cli.main import main"),
    ],
)
def test_downward_imports_and_those_within_a_package_are_allowed(module: tuple[str, ...], line: str):
    assert violations(line, module) == []


def test_relative_imports_of_an_init_file_start_at_its_package():
    assert violations("from .optimise import x\nfrom ..errors import y", ("cmap",), is_package=True) == []
    assert len(violations("from ..backbones import y", ("cmap",), is_package=True)) == 1
