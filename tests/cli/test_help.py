"""Help, version and usage errors of the command line: quick, whole, and in agreement with the package."""

import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from cmap_defense import __version__
from cmap_defense.attacks.suites import SUITES
from cmap_defense.backbones.networks import NETWORKS, PRESETS
from cmap_defense.backbones.record import PRESETS as RECORDED
from cmap_defense.backbones.weights import DTYPES
from cmap_defense.certification import CertificationSettings
from cmap_defense.cli import options
from cmap_defense.cli.commands import quality
from cmap_defense.cli.main import WAITING, cli, format_warning
from cmap_defense.cmap import CMAPSettings
from cmap_defense.common.inputs import RESIZE_MODES
from cmap_defense.common.settings import Settings
from cmap_defense.data import DATASETS
from cmap_defense.errors import ClassifierWarning
from cmap_defense.evaluation import Protocol, Subset
from cmap_defense.paper import STUDIES
from cmap_defense.purifiers.names import NAMES
from cmap_defense.quality.run import SAMPLES
from cmap_defense.threat import ThreatModel
from cmap_defense.training import TrainingConfig
from cmap_defense.training.config import WEIGHTS_DTYPES
from cmap_defense.training.objectives import OBJECTIVES

from .conftest import Run


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands with their paths, the groups among them too."""
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
WITHOUT_TORCH = """
import contextlib, io, sys
from cmap_defense.cli.main import main

for arguments, status in {calls}:
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        found = main(list(arguments))
    assert found == status, (arguments, found, errors.getvalue())
    assert not {{"torch", "numpy", "PIL", "tqdm"}} & sys.modules.keys(), arguments
"""

WRONG_USAGE = [
    "nothing",
    "demo --oops",
    "demo --images 0",
    "demo --threads 0",
    "purify image.png",
    "purify image.png -b x -o x --resize oops",
    "evaluate -b x",
    "evaluate -b x -c x -d x -o x --eps oops",
    "evaluate -b x -c x -d x -o x --mean oops",
    "report not-there",
    "certify -c x -d x -o x --sigma oops",
    "study oops",
    "detect --kernel oops",
    "quality",
    "train",
    "train --data x -o x --set oops",
    "train --data x -o x --channels oops",
    "backbones oops",
    "backbones convert not-there out --from jcm",
]


def test_help_version_and_usage_errors_do_not_import_torch() -> None:
    calls = [((*path, "--help"), 0) for path in COMMANDS] + [(("--version",), 0)]
    calls += [(tuple(line.split()), 2) for line in WRONG_USAGE]
    script = WITHOUT_TORCH.format(calls=calls)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_is_in_a_group_and_explained_in_whole_phrases(path: tuple[str, ...]) -> None:
    for option in COMMANDS[path].params:
        if not isinstance(option, click.Option) or option.name == "version":
            continue
        assert getattr(option, "group", None), option.name
        text = (option.help or "").split("  [")[0]
        assert text.endswith("."), (option.name, text)
        assert len(text.split()) > 2, (option.name, text)
        assert text.split()[0] not in {"Of", "For", "In", "Per", "With", "It", "That", "By"}, (option.name, text)


@pytest.mark.parametrize(
    ("command", "settings", "others"),
    [
        ("evaluate", CMAPSettings, {"n_latents", "iterations", "learning_rate"}),
        ("evaluate", Protocol, set()),
        ("evaluate", ThreatModel, set()),
        ("evaluate", Subset, {"count", "order"}),
        ("certify", CertificationSettings, {"batch_size"}),
        ("train", TrainingConfig, {"images", "minutes", "checkpoint_part_mb", "micro_batch"}),
    ],
)
def test_options_are_those_of_the_settings(command: str, settings: type[Settings], others: set[str]) -> None:
    """Names, defaults and choices; ``others`` have no default on the command line."""
    found = {option.name: option for option in COMMANDS[command,].params}
    for field in dataclasses.fields(settings):
        if field.name not in found or not field.metadata.get("help"):
            continue
        option = found[field.name]
        assert isinstance(option, click.Option)
        other = {"n": "--samples"}  # -n is the number of images in every command
        assert other.get(field.name, "--" + field.name.replace("_", "-")) in option.opts
        assert option.help == field.metadata["help"]
        context = click.Context(COMMANDS[command,])
        default = option.get_default(context, call=True)
        value = option.type_cast_value(context, None if field.name in others else default)
        if field.name not in others:
            assert settings(**{field.name: value}) == settings(), field.name
        if "choices" in field.metadata:
            assert list(option.type.to_info_dict()["choices"]) == list(field.metadata["choices"])


def test_help_shows_the_groups(run: Run) -> None:
    lines = run("evaluate", "--help").splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith((" ", "Usage"))]
    assert headings == [
        "Model:",
        "Purification:",
        "Running:",
        "Data:",
        "Attacks:",
        "Predictions and runs:",
        "Checks of the attacks:",
        "Output:",
        "Other options:",
    ]
    assert lines[-1].split() == ["-h,", "--help", "Show", "this", "message", "and", "exit."]
    assert "[default: (8/255; l2 has none); x>=0]" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize("path", [path for path, command in COMMANDS.items() if isinstance(command, click.Group)])
def test_summaries_are_shown_whole(path: tuple[str, ...], run: Run) -> None:
    shown, group = " ".join(run(*path, "--help").split()), COMMANDS[path]
    assert isinstance(group, click.Group)
    for name, command in group.commands.items():
        summary = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
        assert f" {name} {summary}" in shown


def test_version(run: Run) -> None:
    assert __version__ in run("--version")


def test_the_console_script_lets_waiting_threads_sleep_before_torch_is_imported() -> None:
    script = (
        "import os, sys\n"
        "from cmap_defense.cli import main\n"
        "main.main = lambda: [print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules), 0][1]\n"
        "main.run()\n"
    )
    others = {name: value for name, value in os.environ.items() if name not in {*WAITING, "KMP_BLOCKTIME"}}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=others)
    assert done.stdout.split() == ["PASSIVE", "False"]


def test_warnings_are_sentences() -> None:
    own = ClassifierWarning("Mind this.")
    assert format_warning(own, ClassifierWarning, "x.py", 3, "code") == "Warning: Mind this.\n"
    assert format_warning("Old.", DeprecationWarning, "x.py", 3) == "x.py:3: DeprecationWarning: Old.\n"


def test_choices_and_defaults_are_those_of_the_package() -> None:
    (samples,) = [option for option in quality.params if option.name == "samples"]
    assert tuple(SUITES) == options.ATTACK_SETS
    assert options.DATASETS == DATASETS
    assert tuple(NAMES) == options.PURIFIERS
    assert options.RESIZE_MODES == RESIZE_MODES
    assert options.PRESETS == RECORDED
    assert samples.default == SAMPLES
    assert tuple(sorted(STUDIES)) == options.STUDIES
    assert options.NETWORKS == NETWORKS
    assert tuple(OBJECTIVES) == options.OBJECTIVES
    assert tuple(PRESETS) == options.NETWORK_PRESETS
    assert tuple(DTYPES) == WEIGHTS_DTYPES
