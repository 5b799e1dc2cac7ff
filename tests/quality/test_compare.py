"""Samples beside real images: which images are in the sets, and what there is without the features."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attack_toys import QUICK, linear, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.common.modules import building
from cmap_defense.data import LabelledImages
from cmap_defense.errors import InputValueError
from cmap_defense.quality import SampleComparison, compare, frechet_distance, sample_images
from toys import ToyBackbone, uniform

NUMBERS = 4


def classifier() -> nn.Module:
    with building():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(144, NUMBERS), nn.Tanh(), nn.Linear(NUMBERS, 3))


def features_of(model: PurifiedClassifier, images: Tensor) -> Tensor:
    assert isinstance(model.classifier, nn.Sequential)
    with torch.no_grad():
        return model.classifier[:-1](model.preprocessing.to_classifier(images))


def quiet(name: str) -> None:
    """What is announced is not listened to."""


def real(count: int) -> tuple[Tensor, Tensor]:
    return uniform(count, 3, 8, 6, seed=7), torch.arange(count) % 3


def compared(model: PurifiedClassifier, data: Any, **changes: Any) -> SampleComparison:
    return SampleComparison(model, data, **({"samples": 20, "features": None, "seed": 5, "group": 7} | changes))


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)


def test_sets_of_one_size_that_share_no_image() -> None:
    model, data = wrapped(classifier=classifier(), normalize=(0.4, 0.3)), real(50)
    work = compared(model, data)
    assert len(set(work.real.tolist())) == len(work.real) == 40
    assert work.real.tolist() != sorted(work.real.tolist())
    found, shown = work.run(quiet)
    frechet = found["frechet"]
    assert (frechet["images"], frechet["module"], frechet["numbers"]) == (20, "3", NUMBERS)
    first, second = features_of(model, data[0][work.real]).split(20)
    made = sample_images(model, torch.arange(20), seed=5)
    assert frechet["samples"] == pytest.approx(frechet_distance(features_of(model, made[:20]), first), rel=1e-4)
    assert frechet["halves"] == pytest.approx(frechet_distance(second, first), rel=1e-4)
    torch.testing.assert_close(shown, made)
    assert found["frechet_reason"] is None


def test_with_fewer_real_images_both_sets_shrink() -> None:
    work = compared(wrapped(classifier=classifier()), real(21), samples=100)
    assert len(work.real) == 21
    found, shown = work.run(quiet)
    assert found["frechet"]["images"] == 10
    assert work.generated == len(shown) == 64


def test_groups_and_the_kind_of_data_change_nothing() -> None:
    model, (images, labels) = wrapped(classifier=classifier()), real(40)
    pixels = (images * 255).round().to(torch.uint8)
    images = pixels.float() / 255
    kinds = [(images, labels), LabelledImages(pixels, labels), TensorDataset(images, labels)]
    found = [compared(model, data, group=group).run(quiet)[0]["frechet"] for data in kinds for group in (64, 3)]
    for other in found[1:]:
        for name in ("samples", "halves"):
            assert other[name] == pytest.approx(found[0][name], rel=1e-4)


def test_samples_that_are_real_images_lie_no_further_than_halves_do() -> None:
    class Fair(ToyBackbone):
        def generate(self, latents: Tensor) -> Tensor:
            return 2 * torch.special.ndtr(latents) - 1  # uniform, as the real ones are

    model = wrapped(classifier=classifier(), backbone=Fair())
    found = compared(model, real(800), samples=400).run(quiet)[0]["frechet"]
    assert found["samples"] < 2 * found["halves"]
    far = compared(wrapped(classifier=classifier()), real(800), samples=400).run(quiet)[0]["frechet"]
    assert far["samples"] > 4 * far["halves"]


def test_images_of_another_size_than_the_backbones() -> None:
    with building():
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    model, data = wrapped(classifier=pooled, resize="bilinear"), (uniform(30, 3, 10, 9, seed=1), torch.zeros(30).long())
    found, shown = compared(model, data).run(quiet)
    assert found["frechet"] is not None
    assert shown.shape == (20, 3, 10, 9)
    with pytest.raises(InputValueError, match="8 x 6 images"):
        compared(wrapped(classifier=pooled), data)


@pytest.mark.parametrize(
    ("model", "count", "reason"),
    [
        (wrapped(classifier=classifier()), 9, "4 vectors of 4 numbers are too few"),
        (wrapped(), 30, r"called no nn\.Linear"),
        (PurifiedClassifier(linear, ToyBackbone(), settings=QUICK), 30, "but the classifier is function"),
    ],
)
def test_where_there_is_no_distance_the_samples_are_there(model: PurifiedClassifier, count: int, reason: str) -> None:
    work = compared(model, real(count))
    found, shown = work.run(quiet)
    assert found["frechet"] is found["fid"] is None
    assert re.search(reason, found["frechet_reason"])
    assert len(shown) == 20
    assert "cmap-defense[quality]" in found["fid_reason"]


def test_fid_is_between_all_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def eye(images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    monkeypatch.setattr(compare, "inception_file", lambda: Path("weights"))
    monkeypatch.setattr(compare, "inception_features", lambda path, device: (eye, f"{path} on {device}"))
    monkeypatch.setattr(compare, "INCEPTION_NUMBERS", 3)
    model, data = wrapped(), real(30)
    work = compared(model, data, samples=70)
    found, shown = work.run(quiet)
    made = sample_images(model, torch.arange(70), seed=5)
    value = pytest.approx(frechet_distance(eye(made), eye(data[0])), rel=1e-4)
    assert found["fid"] == {"value": value, "samples": 70, "real": 30, "source": "weights on cpu"}
    assert found["frechet"] is found["fid_reason"] is None
    assert work.generated == 70
    assert len(shown) == 64
    monkeypatch.setattr(compare, "INCEPTION_NUMBERS", 30)
    assert "30 vectors of 30 numbers" in str(compared(model, data, samples=70).reasons["fid"])
    other = PurifiedClassifier(lambda images: images.flatten(1), ToyBackbone((2, 8, 6)), settings=QUICK)
    assert "these have 2" in str(compared(other, (data[0][:, :2], data[1])).reasons["fid"])


def test_steps_are_announced() -> None:
    for model, steps in ((wrapped(classifier=classifier()), 3 + 6), (wrapped(), 3)):
        work, said = compared(model, real(40)), []
        work.run(said.append)
        assert said.count("") == work.steps == steps
        assert said[0] == "generating samples"
