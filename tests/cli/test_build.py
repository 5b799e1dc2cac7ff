"""Models by import path, and their weights in files of other libraries."""

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cmap_defense import PurifiedClassifier
from cmap_defense.cli.build import imported_model
from cmap_defense.embedded import ASSETS
from cmap_defense.errors import ClassifierWarning
from cmap_defense.purifiers import OneStep

CPU = torch.device("cpu")
CODE = """
    import torch
    from torch import nn

    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    ready = net()

    def wrapped():
        return nn.ModuleDict({"model": net()})

    def failing():
        raise ZeroDivisionError("nothing to divide by")

    def calling_wrongly():
        return nn.Linear(4)

    def needs(width):
        return nn.Linear(width, 3)

    def leaving():
        raise SystemExit(3)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "my_models.py").write_text(textwrap.dedent(CODE))
    return tmp_path / "my_models.py"


def state() -> dict[str, Tensor]:
    return {"1.weight": torch.arange(12.0).reshape(3, 4), "1.bias": torch.tensor([3.0, 1.0, 4.0])}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state().items()}


def loaded(file: Path, weights: Path, option: str = "--classifier", name: str = "net") -> nn.Module:
    made = imported_model(f"{file}:{name}", weights, CPU, option)
    assert isinstance(made, nn.Module)
    return made


SAVED: dict[str, Any] = {
    "plain": state(),
    "DataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "a checkpoint": {"state_dict": state(), "epoch": 3, "best": torch.tensor(0.5)},
    "Lightning": {"state_dict": prefixed("model."), "global_step": 7},
    "model": {"model": state(), "optimizer": {"lr": 0.1}},
    "model_state_dict": {"model_state_dict": prefixed("module.")},
    "net": {"net": prefixed("module."), "acc": 95.0},
}


@pytest.mark.parametrize("name", SAVED)
def test_files_of_torch_save(tmp_path: Path, file: Path, name: str) -> None:
    torch.save(SAVED[name], tmp_path / "w.pth", _use_new_zipfile_serialization=name != "plain")
    found = loaded(file, tmp_path / "w.pth").state_dict()
    assert found.keys() == state().keys()
    assert all(torch.equal(found[key], value) for key, value in state().items())


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize(("ending", "name"), [("safetensors", "net"), ("bin", "net"), ("safetensors", "ready")])
def test_files_of_safetensors(tmp_path: Path, file: Path, prefix: str, ending: str, name: str) -> None:
    save_file(prefixed(prefix), tmp_path / f"w.{ending}")
    model = loaded(file, tmp_path / f"w.{ending}", name=name)
    assert torch.equal(model.state_dict()["1.weight"], state()["1.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_prefix_that_the_model_has_stays(tmp_path: Path, file: Path) -> None:
    torch.save(prefixed("model."), tmp_path / "w.pt")
    assert torch.equal(loaded(file, tmp_path / "w.pt", name="wrapped").state_dict()["model.1.bias"], state()["1.bias"])


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path: Path, file: Path) -> None:
    torch.save({"state_dict": state(), "more": Harmful(tmp_path / "executed")}, tmp_path / "w.pt")
    with pytest.raises(click.BadParameter, match="requires code to be run"):
        loaded(file, tmp_path / "w.pt")
    assert not (tmp_path / "executed").exists()


WRONG: dict[str, tuple[Any, str]] = {
    "other names": ({"other.weight": torch.zeros(3, 4)}, r"does not hold 1\.weight, 1\.bias; it holds besides other"),
    "a prefix of some": (prefixed("module.") | {"x": torch.zeros(1)}, r"holds besides module\.1\.weight"),
    "other shapes": (state() | {"1.bias": torch.zeros(7)}, r"is not of this model: it has other shapes for 1\.bias"),
    "no state dict": ({"weights": [1, 2]}, "holds no state dict, by itself or as state_dict"),
    "a whole model": (nn.Linear(4, 3), r"requires code to be run.*Save the state dict alone: torch\.save\(model\."),
    "numbers": ([1.5], "holds no state dict"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(("option", "named"), [("--classifier", "--weights"), ("--other", "--other")])
def test_what_is_no_file_of_this_model_names_the_option(
    tmp_path: Path, file: Path, name: str, option: str, named: str
) -> None:
    saved, message = WRONG[name]
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(click.BadParameter, match=message) as caught:
        loaded(file, tmp_path / "w.pt", option)
    assert caught.value.param_hint == named
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_damaged_file(tmp_path: Path, file: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a file of weights")
    with pytest.raises(click.BadParameter, match=rf"{name} is not a whole|{name} is refused"):
        loaded(file, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("failing", "my_models.py:failing raised ZeroDivisionError: nothing to divide by"),
        ("calling_wrongly", "my_models.py:calling_wrongly raised TypeError: .*out_features"),
        ("needs", "missing a required argument: 'width'. Name a model, or a function without arguments"),
        ("leaving", "my_models.py:leaving raised SystemExit: 3"),
    ],
)
def test_a_factory_that_raises_is_named(file: Path, name: str, message: str) -> None:
    with pytest.raises(click.BadParameter, match=message) as caught:
        imported_model(f"{file}:{name}", None, CPU, "--classifier")
    assert caught.value.param_hint == "--classifier"


@pytest.mark.parametrize(
    ("code", "message"),
    [("1 / 0", "raised ZeroDivisionError"), ("x = (", "raised SyntaxError"), ("import nothing_here", "be imported")],
)
def test_a_module_that_raises_is_named(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(click.BadParameter, match=rf"broken\.py:net .*{message}"):
        imported_model(f"{tmp_path}/broken.py:net", None, CPU, "--classifier")


ADAPTED, PLAIN = (ASSETS.parent / name / "classifier.safetensors" for name in ("fashion-mnist-adapted", ASSETS.name))


def behind_level_half(name: str, weights: Path) -> None:
    classifier = imported_model(name, weights, CPU, "--classifier")
    PurifiedClassifier(classifier, "fashion-mnist-ct", purifier=OneStep(level=0.5))


def test_weights_of_an_adaptation_bring_what_they_were_adapted_to(tmp_path: Path) -> None:
    with pytest.warns(ClassifierWarning, match="adapted to another purifier"):
        behind_level_half("embedded", ADAPTED)
    for record in ("not JSON", "{}", json.dumps({"weights_sha256": "0" * 64, "purifier": {}, "backbone": ""}), None):
        shutil.copy(ADAPTED, tmp_path / "w.safetensors")
        if record is None:  # that of the package, beside other weights
            shutil.copy(PLAIN, tmp_path / "w.safetensors")
            record = (ADAPTED.parent / "adaptation.json").read_text()
        (tmp_path / "adaptation.json").write_text(record)
        behind_level_half("embedded", tmp_path / "w.safetensors")  # a warning would be an error


def test_what_an_adapted_classifier_was_adapted_to_goes_with_its_own_weights() -> None:
    behind_level_half("fashion-mnist-adapted", PLAIN)  # a warning would be an error


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "its_layers.py").write_text("from torch import nn\nlayer = nn.Linear(4, 3)\n")
    (tmp_path / "its_models.py").write_text("from its_layers import layer\n")
    assert imported_model(f"{tmp_path / 'its_models.py'}:layer", None, CPU, "--classifier")(torch.rand(2, 4)).shape == (
        2,
        3,
    )
