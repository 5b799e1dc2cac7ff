"""Several processes that share each batch: they end with what one process would have made, and agree or all refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmap_defense import load_backbone
from cmap_defense.backbones.folder import read_record
from cmap_defense.cli.main import main as command
from cmap_defense.training.loop import countdown
from processes import run_ranks
from training.together import ODD, commands, main
from training.trained import run

NO_EFFECT = ("conv_in.bias", "up.4.block.conv_out.bias", "up.4.block.skip.bias")
"""Biases in front of a normalisation of single channels, which takes them out again: their gradients are zero but for
rounding, of which Adam makes whole steps."""


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """Folders of trainings by two ranks, the outcome of each, and the weights that each ended with."""
    folder = tmp_path_factory.mktemp("together")
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 12, 3)).astype(np.uint8)
    np.savez(folder / "data.npz", images=images)
    run(folder / "begun", seconds_left=countdown(1.0, iter([0.0, *[1.0] * 4, 99.0]).__next__))
    assert run_ranks(main, folder) == [0, 0]
    found = [folder / f"rank-{rank}.json" for rank in range(2)]
    weights = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    return folder, [json.loads(path.read_text()) for path in found], weights


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to 1e-5, a two-hundredth of one of Adam's steps, in all weights and averages that have an effect."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith(("weights/", "ema-")) and not name.endswith(NO_EFFECT):
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


def logged(folder: Path) -> dict[int, float]:
    """Mean losses by step."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.parametrize("name", ["whole", "odd", "begun"])
def test_two_ranks_end_with_the_weights_of_one_process(met: Any, tmp_path: Path, name: str) -> None:
    """With batches that they share equally or not, and where one process was before."""
    folder, found, weights = met
    assert [rank[name].get("message") for rank in found] == [None, None]
    alone, _ = run(tmp_path, changes=ODD if name == "odd" else None)
    assert_close(weights[0][name], alone.tensors())
    for key, tensor in weights[0][name].items():
        assert torch.equal(weights[1][name][key], tensor), "the ranks hold the same bits"
    theirs, ours = logged(folder / name), logged(tmp_path)
    assert list(theirs) == list(ours) == list(range(1, len(ours) + 1))
    for step in ours:
        assert theirs[step] == pytest.approx(ours[step], rel=1e-4), "the loss of the whole batch"


def test_one_process_goes_on_where_two_were(met: Any, tmp_path: Path) -> None:
    folder, found, _ = met
    assert [rank["late"].get("message") for rank in found] == [None, None]
    assert list(logged(folder / "late")) == list(range(1, 6)), "the first rank's clock decides"
    alone, _ = run(folder / "late")
    assert list(logged(folder / "late")) == list(range(1, 13))
    assert_close(alone.tensors(), run(tmp_path)[0].tensors())


def test_the_length_of_a_plan_is_that_of_the_first_ranks_clock(met: Any) -> None:
    folder, found, _ = met
    assert [rank["planned"].get("message") for rank in found] == [None, None]
    first, second = ({name: rank["planned"][name] for name in ("planned", "seen", "finished")} for rank in found)
    assert first == second
    plan = json.loads((folder / "planned" / "plan.json").read_text())
    record = read_record(folder / "planned" / "backbone")
    assert first["planned"] == plan["images"] == record.training["images_planned"]
    assert 0 < first["seen"] < first["planned"], "each look at this clock takes 7 s, so the minutes end before"
    assert first["planned"] > 1000, "by the second rank's clock it would be a fifteenth"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other", "batch_size: 8 before, 7 now"),
        ("at odds", "Rank 1 was started with other settings than the first"),
        ("in use", "Another training is writing to"),
        ("too many", "A batch of 1 images cannot be shared by 2 processes"),
    ],
)
def test_what_is_refused_is_refused_to_both_ranks_at_once(met: Any, name: str, said: str) -> None:
    _, found, _ = met
    for rank in found:
        assert said in rank[name]["message"]


def test_the_command_line_writes_one_backbone(met: Any, capfd: pytest.CaptureFixture[str]) -> None:
    folder, found, _ = met
    assert [rank["command"].get("message") for rank in found] == [None, None]
    one = load_backbone(folder / "command" / "backbone")
    arguments = [*commands(folder)[:-1], str(folder / "alone")]
    assert command(arguments) == 0
    assert json.loads(capfd.readouterr().out)["finished"]
    latents = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    alone = load_backbone(folder / "alone" / "backbone")
    torch.testing.assert_close(one.generate(latents), alone.generate(latents), rtol=0, atol=1e-5)
    assert sorted(path.name for path in (folder / "command").iterdir()) == sorted(
        path.name for path in (folder / "alone").iterdir()
    )


def test_ranks_exchange_values(met: Any) -> None:
    _, found, _ = met
    sums = [[3.0] * 6, [30.0], [1.0] * 12]
    assert [rank["helpers"] for rank in found] == [
        {"said": "by 0", "done": done, "sums": sums, "failed": "no room"} for done in ([0], [])
    ]
