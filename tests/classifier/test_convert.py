"""Images as people have them: purify takes them, and the error of forward has the line that converts them."""

import re
from pathlib import Path
from typing import Any

import numpy
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from attack_toys import CLASSES
from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.errors import CmapError, InputTypeError, InputValueError
from toys import ToyBackbone

QUICK = CMAPSettings(n_latents=2, iterations=2, learning_rate=0.1)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
UNIT = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255
GREY = np.stack([np.asarray(Image.fromarray(part).convert("L")) for part in PIXELS])
GREY_UNIT = torch.from_numpy(GREY)[:, None].float() / 255


def model(channels: int = 3, **options: Any) -> PurifiedClassifier:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(channels * 48, CLASSES)).eval()
    return PurifiedClassifier(classifier, ToyBackbone((channels, 8, 6)), settings=QUICK, seed=3, **options)


def pil(*, mode: str = "RGB") -> list[Image.Image]:
    return [Image.fromarray(part).convert(mode) for part in PIXELS]


TAKEN: dict[str, tuple[int, Any, Tensor]] = {
    "a batch of tensors": (3, UNIT, UNIT),
    "one tensor": (3, UNIT[0], UNIT[:1]),
    "8-bit tensors": (3, torch.from_numpy(PIXELS).permute(0, 3, 1, 2), UNIT),
    "one 8-bit tensor": (3, torch.from_numpy(PIXELS[0]).permute(2, 0, 1), UNIT[:1]),
    "8-bit arrays": (3, PIXELS, UNIT),
    "one 8-bit array": (3, PIXELS[0], UNIT[:1]),
    "float64 arrays": (3, PIXELS / 255, UNIT),
    "an array that cannot be written to": (3, np.broadcast_to(PIXELS[0], (2, 8, 6, 3)), UNIT[[0, 0]]),
    "a grey array": (1, GREY[0], GREY_UNIT[:1]),
    "a grey array with an axis": (1, GREY[..., None], GREY_UNIT),
    "a PIL image": (3, pil()[0], UNIT[:1]),
    "PIL images": (3, pil(), UNIT),
    "PIL images with alpha": (3, pil(mode="RGBA"), UNIT),
    "PIL images for a grey backbone": (1, tuple(pil()), GREY_UNIT),
    "grey PIL images for an RGB backbone": (3, pil(mode="L"), GREY_UNIT.expand(-1, 3, -1, -1)),
    "a list of arrays": (3, list(PIXELS), UNIT),
    "a list of tensors": (3, list(UNIT), UNIT),
}


@pytest.mark.parametrize("name", TAKEN)
def test_purify_takes_them(name: str) -> None:
    channels, given, unit = TAKEN[name]
    found, expected = model(channels).purify(given), model(channels).purify(unit)
    assert found.images.shape == (len(unit), 2, channels, 8, 6)
    assert torch.equal(found.latents, expected.latents)
    assert found.latents.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in TAKEN if name != "a batch of tensors"])
def test_the_line_in_the_error_of_forward_converts_them(name: str) -> None:
    channels, given, unit = TAKEN[name]
    assert torch.allclose(converted(given, channels), unit, atol=0.5 / 255)


def converted(images: Any, channels: int) -> Tensor:
    """What the line in the error makes of images."""
    defended = model(channels)
    with pytest.raises((InputTypeError, InputValueError)) as caught:
        defended(images)
    line = re.search(r"Convert them: (.*)\.$", str(caught.value))
    assert line is not None, str(caught.value)
    made = eval(line.group(1), {"torch": torch, "numpy": numpy, "torchvision": torchvision, "images": images})
    assert defended(made).shape == (len(made), CLASSES)
    return made


LINES: dict[str, tuple[int, Any, Tensor]] = {
    "channels last": (3, UNIT.permute(0, 2, 3, 1), UNIT),
    "one, channels last": (3, UNIT[0].permute(1, 2, 0), UNIT[:1]),
    "an array with channels first": (3, UNIT.numpy(), UNIT),
    "grey tensors for an RGB backbone": (3, GREY_UNIT, GREY_UNIT.expand(-1, 3, -1, -1)),
    "RGB tensors for a grey backbone": (1, UNIT, UNIT.mean(dim=1, keepdim=True)),
    "8-bit RGB arrays for a grey backbone": (1, PIXELS, UNIT.mean(dim=1, keepdim=True)),
    "alpha": (3, np.concatenate([PIXELS, PIXELS[..., :1]], axis=3), UNIT),
    "grey arrays without an axis": (1, GREY, GREY_UNIT),
    "a list of grey arrays": (1, list(GREY), GREY_UNIT),
}


@pytest.mark.parametrize("name", LINES)
def test_other_images_have_a_line_too(name: str) -> None:
    channels, given, unit = LINES[name]
    assert torch.allclose(converted(given, channels), unit, atol=1e-6)


def test_a_float_batch_keeps_its_graph_and_its_identity() -> None:
    leaf = UNIT.clone().requires_grad_()
    model().purify(leaf[0]).images.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("given", [PIXELS, pil(), torch.from_numpy(PIXELS).permute(0, 3, 1, 2)], ids=type)
def test_8_bit_images_are_not_normalised_yet(given: Any) -> None:
    defended = model(normalize=(0.4, 0.3), inputs="normalized")
    expected = defended.purify((UNIT - 0.4) / 0.3)
    assert torch.allclose(defended.purify(given).latents, expected.latents, atol=1e-4)
    float_array = ((PIXELS / 255) - 0.4) / 0.3
    assert torch.allclose(defended.purify(float_array).latents, expected.latents, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (PIXELS.astype(np.int64), "uint8, or floating-point"),
        (PIXELS[..., :2], r"\[B, H, W, 3\]"),
        (GREY, r"\[B, H, W, 3\]"),
        (Image.fromarray(GREY[0].astype(np.int32)), "65535"),
        ([], "holds nothing"),
        ([1, 2], "holds int"),
        ([Image.new("RGB", (6, 8)), Image.new("RGB", (8, 6))], "one size"),
        (Image.new("RGB", (9, 7)), 'resize="bilinear"'),
        ("image.png", r"'image\.png' is a path\. Open it"),
        ([Path("image.png")], r"'image\.png' is a path"),
        ([Image.new("RGB", (6, 8)), torch.rand(3, 8, 6)], "some are 8-bit images and others floating-point"),
        (np.zeros((2, 8, 6)), r"but are \[2, 8, 6\]\."),
    ],
)
def test_what_purify_does_not_take(given: Any, words: str) -> None:
    with pytest.raises(CmapError, match=words):
        model().purify(given)


@pytest.mark.parametrize(
    "transform",
    [
        torchvision.transforms.Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
        torchvision.transforms.Normalize(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])),
        v2.Normalize([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]),
    ],
    ids=["tuples", "tensors", "v2"],
)
def test_torchvisions_normalize_is_a_mean_and_a_std(transform: Any) -> None:
    pair = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = model(normalize=pair)(UNIT)
    torch.testing.assert_close(model(normalize=transform)(UNIT), expected)
    normalised = model(normalize=transform, inputs="normalised")
    torch.testing.assert_close(normalised(transform(UNIT)), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        normalised.variant(vote="soft").purify(transform(UNIT)).latents, normalised.purify(transform(UNIT)).latents
    )


def test_one_number_in_a_list_is_for_all_channels_and_another_transform_is_refused() -> None:
    transform = torchvision.transforms.Normalize([0.4], [0.3])
    assert torch.equal(model(normalize=transform)(UNIT), model(normalize=(0.4, 0.3))(UNIT))
    with pytest.raises(CmapError, match="Normalize"):
        model(normalize=torchvision.transforms.CenterCrop(3))


def test_a_result_shows_shapes() -> None:
    shown = repr(model().purify(PIXELS))
    assert f"  images: torch.float32 [{len(PIXELS)}, 2, 3, 8, 6]\n" in shown
    assert "  history: History(\n    l1: torch.float32 [" in shown
    assert "class_labels: None" in shown
    assert len(shown.splitlines()) < 25


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as broken, pytest.raises(InputValueError, match=r"broken\.png cannot be read"):
        model().purify(broken)
    closed = Image.open(path)
    closed.close()
    with pytest.raises(InputValueError, match="cannot be read"):
        model().purify(closed)
