"""Sample images: the right pixels and predictions, as files inside the page."""

import base64
import io
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from cmap_defense.evaluation.report.page import DIFFERENCE, Picture, class_name, picture, samples
from cmap_defense.evaluation.results import ResultsFolder, WorkUnit
from example_report import CIFAR, example_folder, example_report


def decoded(found: Picture) -> Tensor:
    """uint8 [C, H, W] of a picture."""
    head, _, text = found.source.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.size == (found.width, found.height)
        return pil_to_tensor(image)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_the_image(channels: int) -> None:
    image = torch.rand((channels, 5, 7), generator=torch.Generator().manual_seed(0))
    found = picture(image, "words")
    assert found.alt == "words"
    assert torch.equal(decoded(found), (image * 255).round().to(torch.uint8))
    whole = (image * 255).round().to(torch.uint8)
    assert torch.equal(decoded(picture(whole, "")), whole)


def test_pictures_are_clamped_and_of_other_channels_the_mean() -> None:
    assert decoded(picture(torch.tensor([-1.0, 0.5, 2.0]).view(1, 1, 3), "")).flatten().tolist() == [0, 128, 255]
    four = torch.tensor([0.1, 0.3, 0.5, 0.7]).view(4, 1, 1).expand(4, 2, 3)
    assert decoded(picture(four, "")).unique().tolist() == [102]


def test_classes_without_names_have_numbers() -> None:
    assert class_name(3, CIFAR) == "cat"
    assert class_name(3, None) == "class 3"
    assert class_name(10, CIFAR) == "class 10"


@pytest.mark.parametrize("channels", [1, 3])
def test_clean_attacked_different_purified(tmp_path: Path, channels: int) -> None:
    report = example_report(attacks=["weak", "strong"])
    folder = example_folder(tmp_path, report, channels=channels, size=12)
    found = samples(report, folder, ["strong", "weak"])
    assert [(attack, list(pictures)) for attack, pictures in found[0].pictures.items()] == [
        ("clean", ["image", "purified"]),
        ("strong", ["image", "difference", "purified"]),
        ("weak", ["image", "difference", "purified"]),
    ]
    assert [sample.position for sample in found] == list(range(6))
    tensors = {
        name: [folder.tensors(WorkUnit(f"defended/{name}", 0, n)) for n in range(2)] for name in ("clean", "strong")
    }
    clean, made = (torch.cat([part["images"] for part in tensors[name]]) for name in ("clean", "strong"))
    purified = torch.cat([part["purified"] for part in tensors["strong"]])
    lines = [line for n in range(2) for line in folder.lines(WorkUnit("defended/strong", 0, n))]
    for row, sample in enumerate(found):
        shown = sample.pictures["strong"]
        assert sample.label == CIFAR[lines[row]["label"]]
        assert sample.predicted["strong"] == CIFAR[lines[row]["predictions"][0]]
        assert sample.right["strong"] == (lines[row]["label"] == lines[row]["predictions"][0])
        assert torch.equal(decoded(sample.pictures["clean"]["image"]), (clean[row] * 255).round().byte())
        assert torch.equal(decoded(shown["purified"]), purified[row])
        change = ((made - clean)[row] * DIFFERENCE + 0.5).clamp(0, 1)
        assert torch.equal(decoded(shown["difference"]), (change * 255).round().byte())
        for attack, pictures in sample.pictures.items():
            for what in pictures.values():
                assert f"image {row}" in what.alt
                assert sample.label in what.alt
                assert attack in what.alt or attack == "clean"


def test_what_the_folder_does_not_hold_is_left_out(tmp_path: Path) -> None:
    report = example_report(attacks=["pgd", "latent"])
    assert samples(report, ResultsFolder(tmp_path / "elsewhere"), ["pgd"]) == []
    folder = example_folder(tmp_path, report)
    (tmp_path / "units/defended/pgd/0-00001.jsonl").unlink()
    found = samples(report, folder, ["pgd", "latent"])
    assert list(found[0].pictures) == ["clean", "latent"]
    for path in (tmp_path / "units/defended/latent").glob("*.safetensors"):
        path.unlink()
    found = samples(report, folder, ["latent"])
    assert list(found[0].pictures) == ["clean"]
    shutil.rmtree(tmp_path / "units/defended/clean")
    assert samples(report, folder, ["latent"]) == []
