"""The precision that a training runs in where its settings say "auto"."""

import json
from pathlib import Path

import pytest

from cmap_defense.modules import multiplies_bfloat16
from cmap_defense.training import precision as module
from cmap_defense.training.plan import PLAN_FILE
from training.test_run import BRIEF, trained

AUTO = BRIEF.replace(precision="auto")


def on_a_processor(monkeypatch: pytest.MonkeyPatch, *, native: bool) -> None:
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: native)


@pytest.mark.parametrize(("native", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_device_multiplies_natively(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: bool, precision: str
) -> None:
    on_a_processor(monkeypatch, native=native)
    done = trained(tmp_path, settings=AUTO)
    assert done.settings == BRIEF.replace(precision=precision)
    record = json.loads((tmp_path / "backbone" / "backbone.json").read_text())
    assert record["training"]["train"]["precision"] == precision


def test_a_continued_training_keeps_the_precision_of_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained(tmp_path, settings=BRIEF.replace(precision="bfloat16"))
    on_a_processor(monkeypatch, native=False)
    assert trained(tmp_path, settings=AUTO).settings.precision == "bfloat16"


def test_a_continued_training_keeps_the_precision_of_its_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_text(json.dumps({"settings": {"train": {"precision": "bfloat16"}}}))
    on_a_processor(monkeypatch, native=False)
    assert trained(tmp_path, settings=AUTO).settings.precision == "bfloat16"


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {"train": {"precision": "float8"}}}'])
def test_a_damaged_plan_does_not_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    (tmp_path / PLAN_FILE).write_text(text)
    on_a_processor(monkeypatch, native=False)
    assert trained(tmp_path, settings=AUTO).settings.precision == "float32"


@pytest.mark.parametrize("feature", ["amx_tile", "avx512_bf16"])
def test_a_processor_with_either_instruction_set_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(f"torch.cpu._is_{name}_supported", lambda: False, raising=False)
    assert not multiplies_bfloat16("cpu")
    monkeypatch.setattr(f"torch.cpu._is_{feature}_supported", lambda: True, raising=False)
    assert multiplies_bfloat16("cpu")
    assert not multiplies_bfloat16("meta")
