"""CompactUNet: its start at zero and what is special to it; ``test_networks.py`` has the laws of all networks."""

import copy

import pytest
import torch

from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import SettingsError
from tiny import randomised
from toys import noise

SMALL = CompactUNetConfig(
    image_shape=(3, 8, 4), channels=(4, 8), blocks=1, attention=(False, True), head_channels=4, embedding=8
)


def test_image_of_a_single_patch_needs_groups_of_channels_and_works_alone_as_in_a_batch() -> None:
    for channels in ((4, 8), (4, 16), (16, 8), (3, 5)):
        with pytest.raises(SettingsError, match="each group of the normalisation has one value only"):
            SMALL.replace(image_shape=(3, 4, 4), channels=channels, head_channels=1)
    config = SMALL.replace(image_shape=(3, 4, 4), channels=(16, 16))
    with torch.random.fork_rng(devices=[]):
        network = randomised(CompactUNet(config).double())
    x, level = noise(2, 3, 4, 4, seed=7, dtype=torch.float64), noise(2, seed=8, dtype=torch.float64)
    alone = torch.cat([network(x[[b]], level[[b]]) for b in range(2)])
    torch.testing.assert_close(network(x, level), alone, rtol=1e-9, atol=1e-9)


def test_one_step_generator_of_a_new_network_is_finite_in_bfloat16() -> None:
    with torch.random.fork_rng(devices=[]):
        backbone = ConsistencyBackbone(CompactUNet(SMALL), SMALL.image_shape).to(torch.bfloat16)
    images = backbone.generate(noise(2, *SMALL.image_shape, seed=5))
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_exact_in_a_network_of_few_bits(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        exact = CompactUNet(SMALL).embed
    few = copy.deepcopy(exact).to(dtype)
    assert torch.equal(few.get_buffer("frequencies"), exact.get_buffer("frequencies"))
    assert few.first.weight.dtype == dtype
    assert "frequencies" not in few.state_dict()


def test_every_class_is_the_same_to_a_new_network_and_differs_afterwards() -> None:
    with torch.random.fork_rng(devices=[]):
        network = CompactUNet(SMALL.replace(num_classes=3))
    assert network.classes is not None
    assert network.classes.weight.abs().max().item() == 0
    network = randomised(network)
    x, level = noise(2, *SMALL.image_shape, seed=1), noise(2, seed=2)
    labels = torch.tensor([0, 1])
    assert (network(x, level, labels) - network(x, level, labels.flip(0))).abs().max().item() > 1e-3
