"""Pictures of a purification."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.classifier import Trajectory
from cmap_defense.data.files import read_image
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.errors import InputTypeError, InputValueError, SettingsError
from cmap_defense.gradients import GradientMode, StraightThrough, Unrolled
from cmap_defense.purifiers import Chain, DiffPure, OneStep, Purifier
from cmap_defense.results import PurificationResult

BOTH = Chain(OneStep(n_latents=2), DiffPure(t=20, step=0.005))
QUICK = CMAPSettings(n_latents=2, iterations=3)


@pytest.fixture(scope="module")
def purified() -> tuple[torch.Tensor, PurificationResult, Trajectory]:
    images = load_test_images()[0][:3]
    model = PurifiedClassifier(load_classifier(), "fashion-mnist-ct", settings=QUICK)
    trajectory = Trajectory(every=2)
    with torch.no_grad():
        result = model.purify(images, seeds=[1, 2, 3], callback=trajectory)
    return images, result, trajectory


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_has_a_row_for_each_image_and_the_input_first(channels: int) -> None:
    images = torch.rand(2, 3, channels, 4, 6)
    inputs = torch.zeros(2, channels, 4, 6)
    result = PurificationResult(images, images)
    assert result.grid(scale=2).size == (3 * 14 + 2, 2 * 10 + 2)
    picture = np.asarray(result.grid(inputs, scale=1))
    assert picture.shape == (2 * 6 + 2, 4 * 8 + 2, 3)
    assert (picture[2:6, 2:8] == 0).all()
    parts = [Image.fromarray(np.zeros((4, 6), np.uint8))] * 2, np.zeros((2, 4, 6, channels), np.uint8)
    assert all(np.array_equal(np.asarray(result.grid(given, scale=1)), picture) for given in parts)
    expected = (images[1, 0].permute(1, 2, 0).expand(-1, -1, 3) * 255).round().numpy()
    np.testing.assert_allclose(picture[8:12, 10:16], expected, atol=1)


def test_images_are_saved_and_shown(purified: tuple, tmp_path: Path) -> None:
    _, result, _ = purified
    files = result.save(tmp_path / "purified")
    assert [file.name for file in files] == [f"{n:04d}-{k}.png" for n in range(3) for k in range(2)]
    assert (read_image(files[3], 1) - result.images[1, 1]).abs().max() <= 0.51 / 255
    html = result._repr_html_()
    assert html.startswith('<img src="data:image/png;base64,')
    assert str(result.labels.tolist()) in html


def test_the_history_is_drawn(purified: tuple) -> None:
    pytest.importorskip("matplotlib")
    _, result, _ = purified
    picture = result.history.plot()
    assert result.plot() == picture
    with pytest.raises(InputValueError, match="no iterations to plot"):
        dataclasses.replace(result, history=None).plot()
    assert picture.format == "PNG"
    assert picture.size == (900, 320)


def test_a_trajectory_is_animated(purified: tuple, tmp_path: Path) -> None:
    images, result, trajectory = purified
    assert len(trajectory.frames) == 2
    assert torch.equal(trajectory.inputs, images)
    with Image.open(trajectory.animate(tmp_path / "a" / "course.gif")) as picture:
        assert picture.n_frames == 2
        assert picture.format == "GIF"
    with Image.open(trajectory.animate(tmp_path / "whole.gif", result, scale=1)) as picture:
        assert picture.n_frames == 3
        picture.seek(2)
        shown, last = picture.convert("RGB"), result.grid(images, scale=1)
    assert shown.size == last.size
    assert np.abs(np.asarray(shown, float) - np.asarray(last, float)).mean() < 4, "up to the colours of a GIF"
    with pytest.raises(InputValueError, match="has 4 purified images, but 6 were seen"):
        trajectory.animate(tmp_path / "none.gif", dataclasses.replace(result, images=result.images[:2]))
    with pytest.raises(SettingsError, match="nothing to animate"):
        Trajectory().animate(tmp_path / "none.gif")
    with pytest.raises(SettingsError, match="every"):
        Trajectory(every=0)


@pytest.mark.parametrize(
    ("purifier", "frames"), [(OneStep(n_latents=3), 1), (DiffPure(t=20, step=0.005, n_latents=2), 4), (BOTH, 4)]
)
@pytest.mark.parametrize("gradient", [StraightThrough(), Unrolled()])
def test_every_purifier_with_steps_has_a_trajectory(
    purifier: Purifier, frames: int, gradient: GradientMode, tmp_path: Path
) -> None:
    images, trajectory = load_test_images()[0][:2, :, :, 2:-2], Trajectory()
    options: dict[str, Any] = {"purifier": purifier, "resize": True, "gradient": gradient}
    model = PurifiedClassifier(load_classifier(), "fashion-mnist-edm", **options)
    result = model.purify(images.requires_grad_(), seeds=[1, 2], callback=trajectory)
    assert len(trajectory.frames) == frames
    assert trajectory.inputs is not None
    versions = len(trajectory.inputs), len(result.images[0]) * 2 // len(trajectory.inputs)
    assert trajectory.frames[-1].shape == (*versions, 1, 28, 28)
    with Image.open(trajectory.animate(tmp_path / "course.gif", result)) as picture:
        assert picture.n_frames == frames + 1
    assert torch.equal(model.purify(images, seeds=[1, 2]).images, result.images)
    with pytest.raises(SettingsError, match="callback"):
        model.purify(images, callback=3)  # pyright: ignore[reportArgumentType]


def test_an_image_that_has_stopped_stays_in_the_trajectory() -> None:
    class State:
        images = torch.rand(2, 1, 4, 6)

        def __init__(self, iteration: int, rows: list[int], value: float) -> None:
            self.iteration, self.image_indices = iteration, torch.tensor(rows)
            self.generated = torch.full((len(rows), 2, 1, 4, 6), value)

    trajectory = Trajectory()
    for _ in range(2):  # each purification begins anew, also where the hook is called from a later iteration on
        trajectory(State(3, [0, 1], -1.0))  # pyright: ignore[reportArgumentType]
        trajectory(State(4, [1], 1.0))  # pyright: ignore[reportArgumentType]
        assert len(trajectory.frames) == 2
        assert torch.equal(trajectory.inputs, State.images)
        assert trajectory.frames[1][0].max() == 0
        assert trajectory.frames[1][1].min() == 1


def test_wrong_inputs_and_the_name_of_a_picture_are_refused(tmp_path: Path) -> None:
    result = PurificationResult(torch.rand(2, 3, 1, 4, 6), torch.rand(2, 3, 1, 4, 6))
    with pytest.raises(InputValueError, match="one for each image"):
        result.grid(torch.rand(1, 1, 4, 6))
    with pytest.raises(InputTypeError, match="are int"):
        result.grid(3)
    with pytest.raises(InputValueError, match="no images to show"):
        PurificationResult(torch.rand(0, 3, 1, 4, 6), torch.rand(0, 3, 1, 4, 6)).grid()
    with pytest.raises(InputValueError, match="a folder is needed"):
        result.save(tmp_path / "result.png")
