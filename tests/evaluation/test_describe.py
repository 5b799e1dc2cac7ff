"""What an evaluation was made of: every change of a model, a data set or an attack shows, and is named."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack_toys import QUICK, Denoiser, Linear, linear, suite, wrapped
from cmap_defense import PurifiedClassifier, load_backbone
from cmap_defense.attacks import PGD, Margin, ThreatModel, Transfer
from cmap_defense.common.describe import description_text
from cmap_defense.common.files import differences, tensor_checksum
from cmap_defense.evaluation.describe import describe_model, describe_software
from cmap_defense.gradients import GradientMode, Unrolled
from cmap_defense.purifiers import BackbonePair, OneStep

PARTS = [("weight", torch.arange(6.0).view(2, 3)), ("bias", torch.tensor([1.0, -0.0])), ("steps", torch.tensor(3))]


@pytest.mark.parametrize("position", range(6))
def test_a_checksum_changes_with_every_element(position: int) -> None:
    """By the smallest step there is."""
    changed = PARTS[0][1].clone()
    flat = changed.view(-1)
    flat[position] = torch.nextafter(flat[position], torch.tensor(100.0))
    assert tensor_checksum([("weight", changed), *PARTS[1:]]) != tensor_checksum(PARTS)


@pytest.mark.parametrize(
    "changed",
    [
        PARTS[::-1],
        PARTS[:2],
        [("weights", PARTS[0][1]), *PARTS[1:]],
        [("weight", PARTS[0][1].view(3, 2)), *PARTS[1:]],
        [("weight", PARTS[0][1].T), *PARTS[1:]],
        [("weight", PARTS[0][1].view(torch.int32)), *PARTS[1:]],
        [("weight", PARTS[0][1].double()), *PARTS[1:]],
        [PARTS[0], ("bias", torch.tensor([1.0, 0.0])), PARTS[2]],
        [*PARTS[:2], ("steps", torch.tensor([3]))],
    ],
    ids=["order", "one less", "name", "shape", "transposed", "type", "precision", "sign of zero", "axes"],
)
def test_a_checksum_changes_with(changed: list[tuple[str, Tensor]]) -> None:
    assert tensor_checksum(changed) != tensor_checksum(PARTS)


def moved(module: nn.Module, name: str) -> nn.Module:
    """A copy with one element of one weight changed."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        weight = other.get_parameter(name).view(-1)
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(100.0))
    return other


def brighter() -> Denoiser:
    """The same class and weights with other code."""
    backbone = Denoiser()
    generate = backbone.generate
    vars(backbone)["generate"] = lambda latents: 0.5 + generate(latents)
    return backbone


CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "K": (lambda: wrapped(settings=QUICK.replace(n_latents=3)), "n_latents: 2 before, 3 now"),
    "learning rate": (lambda: wrapped(settings=QUICK.replace(learning_rate=0.2)), "learning_rate: 0.1 before, 0.2 now"),
    "vote": (lambda: wrapped(vote="soft"), "vote: label before, soft now"),
    "seed": (lambda: wrapped(seed=0), "seed: None before, 0 now"),
    "gradient": (lambda: wrapped(gradient=Unrolled(last=2)), "gradient: StraightThrough() before, Unrolled(last=2,"),
    "class labels": (lambda: wrapped(class_labels="spread"), "class_labels: predicted before, spread now"),
    "resize": (lambda: wrapped(resize="area"), "resize: None before, area now"),
    "normalize": (lambda: wrapped(normalize=(0.5, 0.25)), "normalize: None before, [[0.5"),
    "max_parallel": (lambda: wrapped(max_parallel=4), "max_parallel: None before, 4 now"),
    "backbone's weights": (lambda: wrapped(backbone=Denoiser(seed=1)), "backbone.weights: "),
    "what it makes": (lambda: wrapped(backbone=brighter()), "backbone.sample: "),
    "one of them": (lambda: wrapped(backbone=moved(Denoiser(), "bias")), "backbone.weights: "),
    "classifier's weights": (lambda: wrapped(classifier=Linear(1.1)), "classifier.weights: "),
    "one of those": (lambda: wrapped(classifier=moved(Linear(), "weight")), "classifier.weights: "),
    "precision": (lambda: wrapped(classifier=Linear().double()), "classifier.precision: torch.float32 before, "),
    "classifier's class": (lambda: wrapped(classifier=linear), "classifier.class: attack_toys.Linear before, "),
}


class Scaled(GradientMode):
    """A gradient mode of a user's."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def purify(self, purification: Any) -> Any: ...


def test_the_options_of_a_gradient_mode_of_a_user_show() -> None:
    found = [describe_model(wrapped(gradient=Scaled(factor))) for factor in (1.0, 1.0, -1.0)]
    assert found[0] == found[1] != found[2]
    assert Scaled(1.0) == Scaled(1.0) != Scaled(-1.0)
    assert repr(Scaled(2.0)) == "Scaled(factor=2.0)"


def test_a_mode_that_keeps_a_function_is_the_same_in_every_process() -> None:
    assert " at 0x" not in json.dumps(describe_model(wrapped(gradient=Scaled(lambda value: value))))  # pyright: ignore[reportArgumentType]


def test_hooks_show_while_they_are_registered() -> None:
    model = wrapped()
    before = describe_model(model)
    with model.register_step_hook(lambda state: None, steps={0}):
        inside = describe_model(model)
    assert describe_model(model) == before != inside
    with model.register_step_hook(lambda state: state.latents, steps={0}):
        assert describe_model(model) != inside


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_shows(name: str) -> None:
    """It, and nothing else about the model."""
    make, said = CHANGES[name]
    found = differences(describe_model(wrapped()), describe_model(make()))
    assert any(line.startswith(said) for line in found)
    assert all(line.startswith(said.split(".")[0]) for line in found)


def test_another_model_is_described_by_class_and_weights() -> None:
    found = describe_model(Linear())
    assert len(found.pop("network")) == 64
    assert found == {
        "class": "attack_toys.Linear",
        "weights": tensor_checksum(Linear().state_dict().items()),
        "precision": "torch.float32",
    }
    assert describe_model(Linear(1.1))["weights"] != found["weights"]
    assert describe_model(linear)["class"] == "attack_toys.linear"


class Shifted(nn.Module):
    """Its shift is a constant that is not saved with its weights, as a model's own normalisation often is."""

    shift: Tensor

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return linear(images + self.shift)


def test_constants_that_are_not_saved_show() -> None:
    assert describe_model(Shifted(0.0)) != describe_model(Shifted(0.5))


def test_another_network_of_the_same_weights_shows() -> None:
    def network(between: nn.Module) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(144, 8), between, nn.Linear(8, 4))

    assert describe_model(network(nn.ReLU())) != describe_model(network(nn.Tanh()))


def a_source(images: Tensor) -> Tensor:
    return linear(images)


def test_an_attack_is_described_in_full() -> None:
    text = description_text(PGD(ThreatModel(eps=0.1), gradient=Unrolled(l1_smoothing=0.3)).to_dict())
    assert text.startswith("PGD(threat=ThreatModel(norm='linf', eps=0.1), restarts=1, ")
    assert "l1_smoothing=0.3" in text


def test_the_settings_of_an_attack_are_those_by_which_it_differs() -> None:
    """As JSON."""
    attacks = [attack for eps in (0.1, 0.2) for attack in suite(ThreatModel(eps=eps)).values()]
    attacks += list(suite(ThreatModel(eps=0.1), seed=3).values())
    attacks += [Transfer(PGD(ThreatModel()), source=Linear(scale)) for scale in (1.0, 2.0)]
    attacks += [Transfer(PGD(ThreatModel()), source=a_source), PGD(ThreatModel(), loss=Margin())]
    found = [json.dumps(attack.to_dict(), allow_nan=False) for attack in attacks]
    assert len(set(found)) == len(found)
    before, now = (PGD(ThreatModel(eps=size / 255), steps=3).to_dict() for size in (8, 4))
    assert differences(before, now) == ["eps: 8/255 before, 4/255 now"]


def test_the_software_is_named() -> None:
    found = describe_software(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert json.loads(json.dumps(found)) == found


def test_a_pair_of_backbones_is_described_by_both_names() -> None:
    pair = BackbonePair.of([load_backbone("fashion-mnist-edm"), load_backbone("fashion-mnist-ct")])
    model = PurifiedClassifier(nn.Flatten(), pair, purifier=OneStep())
    assert describe_model(model)["backbone"]["name"] == "fashion-mnist-ct and fashion-mnist-edm"
