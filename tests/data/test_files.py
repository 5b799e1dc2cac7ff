"""Image files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmap_defense.data import read_image, write_image
from cmap_defense.errors import CmapError
from toys import uniform


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_to_the_nearest_eighth_bit(tmp_path: Path, channels: int) -> None:
    image = (uniform(channels, 9, 5, seed=1) * 255).round() / 255
    path = write_image(image, tmp_path / "new" / "image.png")
    assert torch.allclose(read_image(path, channels), image, atol=1e-6)
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]


def test_colour_becomes_grey_and_grey_becomes_colour(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (255, 255, 255)).save(tmp_path / "white.png")
    assert torch.equal(read_image(tmp_path / "white.png", 1), torch.ones(1, 3, 4))
    Image.new("L", (4, 3), 0).save(tmp_path / "black.png")
    assert torch.equal(read_image(tmp_path / "black.png", 3), torch.zeros(3, 3, 4))


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    expected = torch.tensor([[[0, 255, 32768, 65535]]]) / 65535
    assert torch.allclose(read_image(tmp_path / "deep.png", 1), expected)


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (7, 3), (255, 0, 0)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", 3).shape == (3, 7, 3)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Image.Image, path: Path, format: str) -> None:  # noqa: A002 - Pillow's name
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        write_image(torch.zeros(1, 2, 2), tmp_path / "image.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"no image", b"\x89PNG\r\n\x1a\n truncated"])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CmapError, match=r"bad\.png"):
        read_image(path, 3)


def test_other_channel_counts() -> None:
    with pytest.raises(CmapError, match="1 or 3"):
        read_image("some.png", 4)
