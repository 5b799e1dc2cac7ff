"""``evaluate``, ``report`` and ``study``: what a user types, what comes back, and what a slip costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from cmap_defense.cli.main import format_warning, main
from cmap_defense.embedded import load_classifier
from cmap_defense.errors import ClassifierWarning
from patience import HANGS

MODEL = ["--backbone", "fashion-mnist-ct", "--classifier", "embedded", "--data", "embedded", "--eps", "0.05"]
SMALL = ["-n", "3", "--latents", "2", "--iterations", "2", "--predictions", "2", "--reevaluations", "2", "--group", "2"]
ATTACKS = ["--steps", "2", "--eot", "1", "--only", "transfer", "--only", "bpda-eot"]
CHECKS = ["--sanity-images", "2", "--gradient-samples", "2", "--threads", "1"]
TINY = [*MODEL, *SMALL, *ATTACKS, *CHECKS]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation; not to be changed."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    assert main(["evaluate", *TINY, "--out", str(out)]) == 0
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


def test_the_same_command_finds_nothing_to_do(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (evaluated / "results.jsonl").read_bytes()
    assert main(["evaluate", *TINY, "--out", str(evaluated)]) == 0
    text = capsys.readouterr().out
    assert "work units are done" in text
    assert "undefended" in text
    assert (evaluated / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--eps", "4/255"], "eps: 0.05 before, 4/255 now"),
        (["--iterations", "3"], "iterations"),
        (["--group", "3"], "group: "),
    ],
)
def test_another_setting_in_the_same_folder_is_refused_and_named(
    evaluated: Path, capsys: pytest.CaptureFixture[str], changed: list[str], named: str
) -> None:
    assert main(["evaluate", *TINY, *changed, "--out", str(evaluated)]) == 1
    shown = capsys.readouterr()
    assert "holds results of another evaluation" in shown.err
    assert named in shown.err
    assert not shown.out  # nothing of a cost or of work that is done, which would be that of other settings
    before = (evaluated / "settings.json").read_bytes()
    assert main(["evaluate", *TINY, *changed, "--out", str(evaluated), "--dry-run"]) == 1
    assert (evaluated / "settings.json").read_bytes() == before


def test_a_dry_run_tells_the_cost_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nothing"
    assert main(["evaluate", *TINY, "--dry-run", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passes"]["defended/bpda-eot"] > found["passes"]["defended/transfer"] > 0
    assert found["seconds"] > 0
    assert not out.exists()


def test_the_report_is_drawn_anew_without_a_model(evaluated: Path, tmp_path: Path) -> None:
    page, text = (evaluated / "report.html").read_bytes(), (evaluated / "report.md").read_bytes()
    (evaluated / "report.html").unlink()
    (evaluated / "report.md").unlink()
    assert main(["report", str(evaluated)]) == 0
    assert (evaluated / "report.html").read_bytes() == page
    assert (evaluated / "report.md").read_bytes() == text


def test_a_folder_without_a_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "report.json" in capsys.readouterr().err


def test_json_holds_the_whole_report(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *TINY, "--json", "--out", str(evaluated)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((evaluated / "report.json").read_text())


def test_the_preset_is_the_papers_protocol_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*MODEL, *SMALL, "--steps", "1", "--eot", "1", "--only", "paper-pgd", *CHECKS]
    assert main(["evaluate", *given, "--preset", "paper", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "3 images of 2 classes, 3 runs, 1 attack;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--classifier", "nowhere"], "no import path"),
        (["--classifier", "no_such_module:x"], "cannot be imported"),
        (["--classifier", "torch:no_such_thing"], "has no no_such_thing"),
        (["--classifier", "math:pi"], "no model"),
        (["--classifier", "math:sqrt"], "without arguments"),
        (["--classifier", "time:time"], "which is no model"),
        (["--only", "bpda"], "Did you mean 'bpda-eot'"),
        (["--eps", "none"], "no size"),
        (["--eps", "8"], "did you mean 8/255?"),
        (["--eps", "8", "--attacks", "none"], "did you mean 8/255?"),
        (["--split", "train"], "all of the test set"),
        (["--mean", "0.5"], "go together"),
        (["--mean", "a,b", "--std", "1"], "one number per channel"),
        (["--baseline", "nothing"], "NAME=PATH"),
        (["--weights", "pyproject.toml"], "is refused"),
    ],
)
def test_wrong_usage_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    (tmp_path / "pyproject.toml").write_text("no weights")
    given = [str(tmp_path / part) if part == "pyproject.toml" else part for part in arguments]
    assert main(["evaluate", *TINY, *given, "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_classifier_from_a_file_with_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_models.py").write_text(
        textwrap.dedent(
            """
            from cmap_defense.embedded import FashionCNN

            def narrow():
                return FashionCNN(4)

            def untrained():
                return FashionCNN()

            ready = FashionCNN()
            """
        )
    )
    state = {name: tensor for name, tensor in load_classifier().state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "weights.safetensors")
    given = [*TINY, "--attacks", "none", "--weights", str(tmp_path / "weights.safetensors")]
    given = [part for part in given if part not in ("--only", "transfer", "bpda-eot")]
    for name in ("untrained", "ready"):
        model = ["--classifier", f"{tmp_path}/my_models.py:{name}"]
        assert main(["evaluate", *given, *model, "--json", "--out", str(tmp_path / name)]) == 0
        report = json.loads(capsys.readouterr().out)
        bare = next(row for row in report["rows"] if row["model"] == "undefended")
        assert bare["average"]["value"] == 1.0, "it has the embedded classifier's weights"
        assert report["refused"] == ["there was no attack. Choose some: --attacks standard."]
    narrow = ["--classifier", f"{tmp_path}/my_models.py:narrow", "--out", str(tmp_path / "x")]
    assert main(["evaluate", *given, *narrow]) == 2
    assert "has other shapes for" in capsys.readouterr().err


def test_weights_of_another_model_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_classifier().state_dict()
    state["surplus"] = torch.zeros(1)
    del state["head.bias"]
    save_file(state, tmp_path / "weights.safetensors")
    weights = ["--weights", str(tmp_path / "weights.safetensors"), "--out", str(tmp_path / "out")]
    assert main(["evaluate", *TINY, *weights]) == 2
    error = capsys.readouterr().err
    assert "head.bias" in error
    assert "surplus" in error


def test_warnings_are_sentences() -> None:
    assert (
        format_warning(ClassifierWarning("Mind this."), ClassifierWarning, "x.py", 3, "code") == "Warning: Mind this.\n"
    )
    assert format_warning("Old.", DeprecationWarning, "x.py", 3) == "x.py:3: DeprecationWarning: Old.\n"


def test_a_study_refuses_an_eps_of_8_bit_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "vote", *MODEL, "--eps", "8", "--out", str(tmp_path / "out")]) == 2
    assert "did you mean 8/255?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_study_compares_its_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*MODEL, *SMALL, "--steps", "1", "--eot", "1", "--threads", "1"]
    assert main(["study", "latents", *given, "--out", str(tmp_path)]) == 0
    assert "Number of latents (Tab. IX)" in capsys.readouterr().out
    facts = json.loads((tmp_path / "study.json").read_text())
    assert {entry["value"] for entry in facts["rows"]} == {1.0, 2.0, 5.0, 10.0}
    assert {entry["attack"] for entry in facts["rows"]} == {"clean", "transfer", "bpda-eot"}
    used = {name: part["models"]["defended"]["settings"]["n_latents"] for name, part in facts["settings"].items()}
    assert used == {"1": 1, "2": 2, "5": 5, "10": 10}
    ElementTree.parse(tmp_path / "study.svg")
    assert "| K | attack |" in (tmp_path / "study.md").read_text()
    assert main(["study", "latents", *given, "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == facts


def test_ranks_share_a_command(tmp_path: Path) -> None:
    """What torchrun starts: the same lines, one report, told once."""
    out = {name: tmp_path / name for name in ("one", "two")}
    command = ["-m", "cmap_defense", "evaluate", *TINY, "--sanity-images", "0"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    texts = {}
    for name, arguments in {"one": command, "two": [*launch, *command]}.items():
        given = [sys.executable, *arguments, "--out", str(out[name])]
        done = subprocess.run(given, capture_output=True, text=True, check=False, env=environment, timeout=HANGS)
        assert done.returncode == 0, done.stderr
        texts[name] = done.stdout
    assert (out["one"] / "results.jsonl").read_bytes() == (out["two"] / "results.jsonl").read_bytes()
    assert {path.name for path in (out["two"] / "timings").iterdir()} == {"rank-0.jsonl", "rank-1.jsonl"}
    assert texts["two"].count("No headline:") == 1
    assert "Evaluate with checks: --sanity-images 16." in texts["two"]
