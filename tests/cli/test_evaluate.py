"""``evaluate``, ``report`` and ``study``."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import click
import pytest

from cmap_defense.cli import build
from cmap_defense.cli import evaluate as module
from cmap_defense.cli.main import main

from .conftest import Run

MODEL = ["--backbone", "fashion-mnist-ct", "--classifier", "embedded", "--data", "embedded", "--eps", "0.05"]
SMALL = ["-n", "3", "--purifier", "cmap", "--n-latents", "2", "--iterations", "2"]
SMALL += ["--predictions", "2", "--reevaluations", "2", "--group", "2", "--steps", "1", "--eot", "1", "--threads", "1"]
TINY = ["evaluate", *MODEL, *SMALL, "--only", "transfer", "--only", "bpda-eot"]
TINY += ["--sanity-images", "2", "--gradient-samples", "2"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation; not to be changed."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    assert main([*TINY, "--out", str(out)]) == 0
    return out


def test_an_evaluation_writes_what_the_page_says(evaluated: Path) -> None:
    names = {path.name for path in evaluated.iterdir()}
    assert {"settings.json", "results.jsonl", "report.json", "report.md", "report.html", "units", "timings"} <= names
    lines = [json.loads(line) for line in (evaluated / "results.jsonl").read_text().splitlines()]
    assert {line["attack"] for line in lines if line["model"] == "defended"} == {"clean", "transfer", "bpda-eot"}
    assert {line["model"] for line in lines} == {"defended", "undefended", "checks"}
    own = [line for line in lines if (line["model"], line["attack"]) == ("defended", "bpda-eot")]
    assert [line["image"] for line in own] == [0, 1, 2]
    assert all(len(line["predictions"]) == 2 and len(line["reevaluated"]) == 2 for line in own)


def test_the_same_command_finds_nothing_to_do(evaluated: Path, run: Run) -> None:
    before = (evaluated / "results.jsonl").read_bytes()
    text = run(*TINY, "--out", evaluated)
    assert "work units are done" in text
    assert "undefended" in text
    assert json.loads(run(*TINY, "--json", "--out", evaluated)) == json.loads((evaluated / "report.json").read_text())
    assert (evaluated / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [(["--eps", "4/255"], "eps: 0.05 before, 4/255 now"), (["--iterations", "3", "--dry-run"], "iterations")],
)
def test_another_setting_in_the_same_folder_is_refused_and_named(
    evaluated: Path, run: Run, changed: list[str], named: str
) -> None:
    before = (evaluated / "settings.json").read_bytes()
    error = run(*TINY, *changed, "--out", evaluated, status=1)
    assert "holds results of another evaluation" in error
    assert named in error
    assert "work units" not in error  # the cost and the work that is done would be those of other settings
    assert (evaluated / "settings.json").read_bytes() == before


def test_a_dry_run_tells_the_cost_and_writes_nothing(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "nothing"
    found = json.loads(run(*TINY, "--dry-run", "--json", "--out", out))
    assert found["passes"]["defended/bpda-eot"] > found["passes"]["defended/transfer"] > 0
    assert found["seconds"] > 0
    assert not out.exists()


@pytest.mark.parametrize("given", [{}, {"--seeds": "0,1", "-n": "3", "--attacks": "standard"}])
def test_the_preset_is_the_papers_protocol_unless_options_say_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run, given: dict[str, str]
) -> None:
    found: dict[str, Any] = {}

    def attacks_of(options: dict[str, Any]) -> None:
        found.update(options)
        raise click.exceptions.Abort

    monkeypatch.setattr(build, "attacks_of", attacks_of)
    words = [word for pair in given.items() for word in pair]
    run("evaluate", *MODEL, "--preset", "paper", *words, "--out", tmp_path, status=130)
    assert (found["count"], found["attacks"]) == ((3, "standard") if given else (500, "paper"))
    assert (found["seeds"], found["order"]) == ((0, 1) if given else (0, 1, 2), "random")


def test_other_purifiers_and_baselines(tmp_path: Path, run: Run) -> None:
    given = [*TINY[:9], "-n", 2, "--attacks", "none", "--predictions", 2, "--reevaluations", 1, "--sanity-images", 0]
    given += ["--purifier", "one-step", "--purifier-set", "level=0.4", "--n-latents", 2, "--baseline", "same=embedded"]
    text = run(*given, "--out", tmp_path)
    assert "2 images of 2 classes, 1 run, 0 attacks; OneStep(level=0.4, n_latents=2);" in text
    assert "there was no attack. Choose some: --attacks standard." in text
    report = json.loads((tmp_path / "report.json").read_text())
    bare = {row["model"]: row["average"]["value"] for row in report["rows"] if row["attack"] == "clean"}
    assert bare["undefended"] == bare["same"] == 1.0


def test_a_study_compares_its_variants(tmp_path: Path, run: Run) -> None:
    given = [*MODEL, *SMALL[:2], *SMALL[4:], "-n", 2, "--out", tmp_path]
    assert "With the vote of the K latents and without it" in run("study", "vote", *given)
    found = json.loads((tmp_path / "study.json").read_text())
    assert {entry["variant"] for entry in found["rows"]} == {"as-it-is"}
    assert {entry["attack"] for entry in found["rows"]} == {"clean", "transfer", "bpda-eot"}
    ElementTree.parse(tmp_path / "study.svg")
    assert "| vote | attack |" in (tmp_path / "study.md").read_text()
    assert json.loads(run("study", "vote", *given, "--json")) == found


def test_purifiers_are_compared(tmp_path: Path, run: Run) -> None:
    """A pair of backbones: each purifier takes the one that it needs; CMAP keeps the settings of its record."""
    given = ["compare", "-b", "fashion-mnist-edm", "-b", "fashion-mnist-ct", *MODEL[2:6], "-n", 2]
    given += ["-p", "identity", "-p", "one-step level=0.4 n_latents=2", "-p", "cmap n_latents=1 iterations=1"]
    given += ["--only", "transfer", "--steps", 1, "--predictions", 1, "--reevaluations", 1, "--out", tmp_path]
    costs = json.loads(run(*given, "--dry-run", "--json"))
    assert [sum(cost["passes"].values()) for cost in costs.values()] == [0, 20, 20]
    text = run(*given, "--dry-run")
    assert "one-step-level=0.4-n_latents=2: 2 of 2 work units to do: 20 network passes" in text
    assert "in all" in text.splitlines()[-1]
    assert not any(tmp_path.iterdir()), "nothing was written"
    text = run(*given)
    assert "defence" in text
    assert "one-step-level=0.4-n_latents=2" in text
    gaps = text[text.index("Differences, image by image:") :].splitlines()
    assert [line.split()[0] for line in gaps[4:7]] == ["identity", "identity", "one-step-level=0.4-n_latents=2"]
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["passes"] for row in found["rows"]] == [0, 2, 2]
    assert "learning_rate=0.1" in found["rows"][2]["purifier"]
    assert json.loads(run(*given, "--json")) == found
    assert "one-step-level=0.4-n_latents=2: All 2 work units are done." in run(*given)
    assert "given twice" in run(*given, "-p", "identity", status=2)
    assert "Did you mean 'one-step'" in run(*given, "-p", "one-stp", status=2)


BOTH = ["-b", "fashion-mnist-edm", "-b", "fashion-mnist-ct", *MODEL[2:]]
LITTLE = ["-n", "2", "--only", "transfer", "--steps", "1", "--predictions", "1", "--reevaluations", "1"]


def test_a_chain_on_two_backbones_with_settings_of_its_purifiers(tmp_path: Path, run: Run) -> None:
    parts = "purifiers=diffpure t=10 step=0.01 n_latents=2, cmap n_latents=1 iterations=1"
    given = [*BOTH, *LITTLE, "--sanity-images", 0, "--purifier", "chain", "--purifier-set", parts, "--out", tmp_path]
    text = run("evaluate", *given)
    assert "; Chain(DiffPure(t=10, solver='sde', step=0.01, " in text
    report = json.loads((tmp_path / "report.json").read_text())
    first, second = report["settings"]["models"]["defended"]["purifier"]["purifiers"]
    assert {"purifier": "diffpure", "t": 10, "step": 0.01, "n_latents": 2}.items() <= first.items()
    assert {"purifier": "cmap", "n_latents": 1, "iterations": 1}.items() <= second.items()
    assert {row["attack"] for row in report["rows"]} >= {"clean", "transfer"}


def test_chains_are_compared_in_folders_of_valid_names(tmp_path: Path, run: Run) -> None:
    """The second one is too long for a name, which has a checksum then."""
    short = "chain purifiers=(diffpure t=10 step=0.01, cmap n_latents=1 iterations=1 betas=(0.5, 9/10)) handed_on=mean"
    long = "chain purifiers=(" + ", ".join(["diffpure t=10 step=0.01 solver=ode variance=posterior"] * 3) + ")"
    given = ["compare", *BOTH, *LITTLE, "-p", short, "-p", long, "-p", long.replace("t=10", "t=20"), "--out", tmp_path]
    costs = json.loads(run(*given, "--dry-run", "--json"))
    assert [sum(cost["passes"].values()) for cost in costs.values()] == [30, 30, 60]
    first, *others = costs
    assert first == (
        "chain-purifiers=(diffpure-t=10-step=0.01,cmap-n_latents=1-iterations=1-betas=(0.5,9_10))-handed_on=mean"
    )
    assert [len(name) for name in others] == [150, 150]
    run(*given)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(costs)
    assert "All 2 work units are done." in run(*given, "--dry-run")
    assert "not closed" in run(*given, "-p", "chain purifiers=(identity", status=2)
    assert "Purifier 2 of the chain, 'cmpa x=1': There is no purifier 'cmpa'. Did you mean 'cmap'" in run(
        *given, "-p", "chain purifiers=(identity, cmpa x=1)", status=2
    )


@pytest.mark.parametrize("command", [["evaluate"], ["compare", "-p", "identity"], ["study", "vote"]])
@pytest.mark.parametrize(
    ("names", "status", "message"),
    [
        (
            ["fashion-mnist-ct"] * 2,
            1,
            "but got consistency, consistency. For one backbone give it without a list; "
            'of the kind "denoiser" are: cifar10-edm-small, fashion-mnist-edm',
        ),
        (["fashion-mnist-ct", "fashion-mnist-edm", "x"], 2, "'--backbone': give one backbone, or two of different"),
    ],
)
def test_other_backbones_than_one_or_two_of_different_kinds_are_refused(
    command: list[str], names: list[str], status: int, message: str, tmp_path: Path, run: Run
) -> None:
    backbones = [word for name in names for word in ("-b", name)]
    assert message in run(*command, *backbones, *MODEL[2:], *LITTLE, "-o", tmp_path / "out", status=status)
    assert not (tmp_path / "out").exists()


def test_of_several_ranks_the_first_one_alone_prints_and_reports(
    evaluated: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[bool] = []
    rank = SimpleNamespace(rank=1, world=2, wait=lambda: waited.append(True))
    monkeypatch.setattr(module, "ranks", lambda: contextlib.nullcontext(rank))
    monkeypatch.setattr(module, "write_report", None)
    assert run(*TINY, "--out", evaluated) == ""
    assert waited == [True]


def test_attacks_on_latents_are_left_out_for_purifiers_without_latents(tmp_path: Path, run: Run) -> None:
    given = ["-b", "fashion-mnist-edm", "-c", "embedded", "-d", "embedded", "-n", 2, "--purifier", "one-step"]
    text = run("evaluate", *given, "--dry-run", "--out", tmp_path / "out")
    assert "Left out, since they need a purifier that optimises latents: latent, consistency-disruption." in text
    text = run("evaluate", *given, "--attacks", "full", "--dry-run", "--out", tmp_path / "out")
    assert "Left out, since each is the same here as an attack before it: unrolled-last, unrolled." in text
    assert "latents" in run("evaluate", *given, "--only", "latent", "--out", tmp_path / "out", status=1)


@pytest.mark.parametrize("command", [["study", "vote"], ["detect"], ["quality"]])
def test_commands_about_cmap_take_no_other_purifier(command: list[str], tmp_path: Path, run: Run) -> None:
    given = ["-b", "fashion-mnist-ct", "-c", "embedded", "-d", "embedded", "-n", 2, "--purifier", "one-step"]
    assert "No such option '--purifier'" in run(*command, *given, "--out", tmp_path / "out", status=2)
