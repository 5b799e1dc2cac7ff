"""Help, version and usage errors of the command line: quick, whole, and in agreement with the package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from cmap_defense.attacks import suites
from cmap_defense.backbones.networks import NETWORKS, PRESETS
from cmap_defense.backbones.weights import DTYPES
from cmap_defense.cli import choices
from cmap_defense.cli.main import WAITING, cli, main, wait_passively
from cmap_defense.cli.options import SUITES
from cmap_defense.data import DATASETS
from cmap_defense.inputs import RESIZE_MODES
from cmap_defense.paper import STUDIES
from cmap_defense.quality.run import SAMPLES
from cmap_defense.training.networks import NETWORKS, PRESETS
from cmap_defense.training.objectives import OBJECTIVES


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands with their paths, the groups among them too."""
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
COMPUTING = [("demo",), ("purify",), ("evaluate",), ("study",), ("analyse",), ("quality",), ("train",)]

WITHOUT_TORCH = """
import contextlib, io, sys
from cmap_defense.cli.main import main

for arguments, status in {calls}:
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        found = main(list(arguments))
    assert found == status, (arguments, found, said.getvalue())
    assert not {{"torch", "numpy", "PIL", "tqdm"}} & sys.modules.keys(), arguments
"""

WRONG_USAGE = [
    ("nothing",),
    ("demo", "--oops"),
    ("demo", "--images", "0"),
    ("demo", "--threads", "0"),
    ("purify", "image.png"),
    ("purify", "image.png", "-b", "x", "-o", "x", "--resize", "oops"),
    ("evaluate", "-b", "x"),
    ("evaluate", "-b", "x", "-c", "x", "-d", "x", "-o", "x", "--eps", "oops"),
    ("evaluate", "-b", "x", "-c", "x", "-d", "x", "-o", "x", "--mean", "oops"),
    ("report", "not-there"),
    ("study", "oops"),
    ("analyse", "--kernel", "oops"),
    ("quality",),
    ("train",),
    ("train", "--data", "x", "-o", "x", "--set", "oops"),
    ("train", "--data", "x", "-o", "x", "--channels", "oops"),
    ("backbones", "oops"),
    ("backbones", "convert", "not-there", "out", "--from", "jcm"),
]


def test_help_version_and_usage_errors_do_not_import_torch() -> None:
    calls = [((*path, "--help"), 0) for path in COMMANDS] + [(("--version",), 0)]
    calls += [(arguments, 2) for arguments in WRONG_USAGE]
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


def test_help_shows_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
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


@pytest.mark.parametrize("path", [path for path, command in COMMANDS.items() if isinstance(command, click.Group)])
def test_summaries_are_shown_whole(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    group = COMMANDS[path]
    assert isinstance(group, click.Group)
    for name, command in group.commands.items():
        summary = " ".join((command.help or "").split("\n\n")[0].split())
        assert f" {name} {summary}" in shown


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


@pytest.mark.parametrize("variable", [*WAITING, "KMP_BLOCKTIME"])
def test_what_the_environment_says_about_waiting_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {variable: "x"})
    wait_passively()
    assert os.environ == {variable: "x"}


@pytest.mark.parametrize("path", COMPUTING, ids=" ".join)
def test_commands_that_compute_take_a_number_of_threads(path: tuple[str, ...]) -> None:
    assert any("--threads" in option.opts for option in COMMANDS[path].params)


def test_choices_and_defaults_are_those_of_the_package() -> None:
    assert set(choices.ATTACK_SETS) == set(SUITES)
    assert {f"{name}_suite" for name in choices.ATTACK_SETS} == set(suites.__all__)
    assert choices.DATASETS == DATASETS
    assert choices.NETWORKS == NETWORKS
    assert tuple(OBJECTIVES) == choices.OBJECTIVES
    assert tuple(PRESETS) == choices.PRESETS
    assert choices.QUALITY_SAMPLES == SAMPLES
    assert choices.RESIZE_MODES == RESIZE_MODES
    assert tuple(sorted(STUDIES)) == choices.STUDIES
    assert tuple(DTYPES) == choices.WEIGHTS_DTYPES
