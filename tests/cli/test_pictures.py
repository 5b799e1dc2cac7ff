"""Pictures that commands write."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from cmap_defense.cli.output import image_sheet, sample_sheet, write_line_charts
from toys import uniform


@pytest.mark.parametrize("values", [[4876.57], [1.0, 1.0], [3.0, 1.0, 2.0]])
def test_a_curve_shows_even_as_a_single_point(tmp_path: Path, values: list[float]) -> None:
    path = write_line_charts(tmp_path / "chart.png", {"a": {"loss": (range(len(values)), values)}}, "x")
    assert path is not None
    with Image.open(path) as drawn:
        below = drawn.convert("RGB").crop((0, 60, drawn.width, drawn.height))
    assert any(abs(r - 0) + abs(g - 114) + abs(b - 178) < 20 for _, (r, g, b) in below.getcolors(10**6))


def test_charts_stand_side_by_side_and_are_the_same_for_the_same_values(tmp_path: Path) -> None:
    charts = {heading: {"one": ([0, 1], [2.0, 3.0]), "other": ([0, 1], [1.0, 0.0])} for heading in "ab"}
    files = [tmp_path / name for name in ("first.png", "second.png")]
    for path in files:
        write_line_charts(path, charts, "x", targets={"a": ("target", 1.0)})
    assert files[0].read_bytes() == files[1].read_bytes()
    with Image.open(files[0]) as drawn:
        assert drawn.size == (860, 320)


def test_samples_stand_in_rows_one_pixel_apart() -> None:
    images = uniform(5, 1, 3, 4, seed=0)
    sheet = sample_sheet(images, scale=2, per_row=2)
    assert sheet.shape == (3, 3 * 7 + 1, 2 * 9 + 1)
    assert torch.equal(sheet[:, 1:7, 10:18], images[1].repeat(3, 1, 1).repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert torch.equal(sheet[:, 0], torch.ones(3, 19))


def test_a_sheet_has_a_cell_for_each_image_with_its_caption() -> None:
    columns = {"one": torch.zeros(3, 3, 28, 28), "two": torch.ones(3, 3, 28, 28)}
    sheet = image_sheet(columns, [["a", "b"]] * 3, "two lines\nof title")
    assert sheet.height == 3 * (28 * 3 + 24) + 80
    assert sheet.getpixel((12 + 40, 72 + 40)) == (0, 0, 0)
    assert sheet.getpixel((12 + 96 + 40, 72 + 40)) == (255, 255, 255)
    bare = image_sheet(columns, [["", ""]] * 3, "two lines\nof title")
    assert sheet.tobytes() != bare.tobytes()
