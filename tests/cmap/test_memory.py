"""The estimate of how many latents fit at once."""

import gc

import pytest
import torch

from cmap_defense.cmap import memory
from cmap_defense.cmap.memory import bytes_per_latent, default_max_parallel
from toys import ToyBackbone

CPU = torch.device("cpu")


def bytes_for(shape: tuple[int, int, int], hidden: int = 8) -> int:
    return bytes_per_latent(ToyBackbone(shape, hidden=hidden).generate, shape, CPU)


@pytest.mark.parametrize(
    ("smaller", "larger"), [((3, 8, 6), (3, 16, 6)), ((3, 8, 6), (3, 8, 12)), ((1, 7, 4), (3, 28, 16))]
)
def test_larger_images_take_more_memory(smaller: tuple[int, int, int], larger: tuple[int, int, int]):
    assert bytes_for(smaller) < bytes_for(larger)


def test_wider_networks_take_more_memory():
    assert bytes_for((3, 8, 6), hidden=4) < bytes_for((3, 8, 6), hidden=64)


def test_a_latent_takes_at_least_what_autograd_keeps_of_its_activations():
    """The toy keeps its input, the hidden layer before and after silu, and its output."""
    channels, height, width, hidden = 3, 8, 6, 16
    kept = 4 * height * width * (2 * channels + 2 * hidden)
    assert bytes_for((channels, height, width), hidden=hidden) >= kept


def test_weights_are_not_counted_per_latent():
    backbone = ToyBackbone((3, 2, 1), hidden=4096)
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    assert bytes_per_latent(backbone.generate, (3, 2, 1), CPU) < weights


def test_estimate_leaves_no_gradient_behind():
    backbone = ToyBackbone()
    bytes_per_latent(backbone.generate, backbone.image_shape, CPU)
    assert all(p.grad is None for p in backbone.parameters())


def test_estimate_works_without_grad_mode():
    backbone = ToyBackbone()
    with torch.no_grad():
        inside = bytes_per_latent(backbone.generate, backbone.image_shape, CPU)
    assert inside == bytes_per_latent(backbone.generate, backbone.image_shape, CPU)


def test_at_least_one_latent_at_once_however_small_the_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "CPU_BUDGET", 1)
    assert default_max_parallel(ToyBackbone().generate, (3, 8, 6), CPU) == 1


def test_default_max_parallel_is_what_fits_the_budget(monkeypatch: pytest.MonkeyPatch):
    shape = (3, 8, 6)
    monkeypatch.setattr(memory, "CPU_BUDGET", 5 * bytes_for(shape) + 1)
    assert default_max_parallel(ToyBackbone(shape).generate, shape, CPU) == 5


def test_the_estimate_keeps_nothing_alive():
    """Outputs that the hooks keep as they are would keep their graph, and the graph them."""
    backbone = ToyBackbone()

    def alive() -> int:
        gc.collect()
        return sum(type(part) is torch.Tensor for part in gc.get_objects())

    bytes_per_latent(backbone.generate, backbone.image_shape, CPU)
    before = alive()
    for _ in range(3):
        bytes_per_latent(backbone.generate, backbone.image_shape, CPU)
    assert alive() == before
