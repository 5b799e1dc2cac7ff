"""Networks by name: their sizes, where they start, how they are set."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from cmap_defense.backbones import ConsistencyBackbone
from cmap_defense.backbones.diffusers import DiffusersUNet, configuration_of
from cmap_defense.backbones.folder import read_backbone, write_backbone
from cmap_defense.backbones.ncsnpp import NCSNpp, NCSNppConfig
from cmap_defense.backbones.networks import NETWORKS, PRESETS, Network, UNet64Config
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import SettingsError, UnknownNameError
from goldens import FOLDER
from toys import noise

TINY_UNET: dict[str, Any] = {
    "channels": [8, 8],
    "blocks": 1,
    "attention": [False, True],
    "head_channels": 4,
    "groups": 4,
}
TINY: dict[str, dict[str, Any]] = {
    "compact": {"channels": [8, 8], "blocks": 1, "attention": [False, True], "head_channels": 4, "embedding": 8},
    "ncsnpp": {"nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4]},
    "imagenet64": TINY_UNET,
}
"""Changes that make a network a matter of milliseconds, for images 3 x 8 x 8."""


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def built(network: Network, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network.build()


def test_the_cifar10_preset_has_ten_million_parameters_and_a_file_of_twenty_megabytes(tmp_path: Path) -> None:
    network = Network.named("compact", (3, 32, 32), PRESETS["cifar10"])
    backbone = ConsistencyBackbone(built(network), network.image_shape)
    assert count(backbone) == 9_628_675
    write_backbone(backbone, tmp_path, name="preset", dtype=torch.float16)
    assert (tmp_path / "weights.safetensors").stat().st_size < 20 * 10**6


def test_the_small_preset_is_the_embedded_backbones_network() -> None:
    network = Network.named("compact", (1, 28, 28), PRESETS["small"])
    assert network.config == CompactUNetConfig(image_shape=(1, 28, 28), channels=(32, 64), attention=(False, True))
    assert count(built(network)) == 1_085_988


def test_the_published_networks_have_their_published_sizes() -> None:
    """Of CIFAR-10 and ImageNet-64 (Song et al. 2023, appendix C): their parameters, the frequencies being a buffer."""
    ncsnpp = Network.named("ncsnpp", (3, 32, 32))
    assert ncsnpp.config == NCSNppConfig()
    imagenet = Network.named("imagenet64", (3, 64, 64), num_classes=1000)
    with torch.device("meta"):
        cifar10 = NCSNpp(ncsnpp.config)
        classes = _unet_on_meta(imagenet.config)
        plain = _unet_on_meta(imagenet.config.replace(num_classes=None))
    assert count(cifar10) + cifar10.embed.frequencies.numel() == 56_395_651
    assert count(classes) == 295_899_267
    assert count(plain) == 295_899_267 - 1000 * 768


def _unet_on_meta(config: UNet64Config) -> nn.Module:
    return diffusers.UNet2DModel.from_config(config.to_unet())


def test_the_imagenet_network_is_the_recorded_pipelines() -> None:
    """The same configuration as the library's own conversion of a model of OpenAI's, but for its size."""
    recorded = json.loads((FOLDER / "diffusers_tiny" / "unet" / "config.json").read_text())
    config = UNet64Config(
        image_shape=(3, 32, 32),
        channels=(32, 32, 64),
        blocks=2,
        attention=(False, True, True),
        head_channels=16,
        num_classes=1000,
    )
    ours = configuration_of(built(Network("imagenet64", config, (3, 32, 32), 1000)))  # pyright: ignore[reportArgumentType]
    assert {name: value for name, value in ours.items() if not name.startswith("_")} == {
        name: value for name, value in recorded.items() if not name.startswith("_")
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_is_zero_or_next_to_it_and_learns(name: str) -> None:
    network = built(Network.named(name, (3, 8, 8), TINY[name]))
    x, level = noise(2, 3, 8, 8, seed=1), noise(2, seed=2)
    output = network(x, level)
    assert output.shape == x.shape
    assert output.abs().max() < (1e-3 if name == "ncsnpp" else 1e-30)
    output.sum().backward()
    last = network.unet.conv_out if isinstance(network, DiffusersUNet) else network.leave
    assert last.weight.grad.abs().max() > 0


def test_every_branch_of_a_fresh_unet_ends_in_zeros() -> None:
    network = built(Network.named("imagenet64", (3, 8, 8), TINY_UNET))
    zero = {name for name, p in network.named_parameters() if not p.any() and name.endswith("weight")}
    ends = {name for name, _ in network.named_parameters() if name.endswith(("conv2.weight", "to_out.0.weight"))}
    assert zero == ends | {"unet.conv_out.weight"}
    assert len(ends) == 10 + 4


@pytest.mark.parametrize("name", NETWORKS)
def test_the_recorded_changes_make_the_same_network(name: str) -> None:
    classes = None if name == "ncsnpp" else 5
    network = Network.named(name, (3, 8, 8), TINY[name], num_classes=classes)
    assert not network.changes.keys() & {"image_shape", "num_classes", "image_size", "num_channels"}
    assert Network.named(name, (3, 8, 8), network.changes, num_classes=classes) == network
    assert network.describe()["name"] == name
    assert network.config.image_shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["compact", "imagenet64"])
def test_a_class_conditional_network_sees_its_classes(name: str, tmp_path: Path) -> None:
    """Not before it has learnt something of them, and its folder keeps them."""
    network = Network.named(name, (3, 8, 8), TINY[name], num_classes=5)
    backbone = ConsistencyBackbone(built(network), (3, 8, 8), num_classes=5).eval()
    with torch.no_grad():
        for index, p in enumerate(backbone.parameters()):
            p.copy_(0.1 * noise(*p.shape, seed=index))
    x, labels = noise(2, 3, 8, 8, seed=1), torch.tensor([1, 4])
    images = backbone.generate(x, labels)
    assert not torch.equal(images, backbone.generate(x, torch.tensor([1, 3])))
    torch.testing.assert_close(images[:1], backbone.generate(x[:1], labels[:1]), rtol=1e-5, atol=1e-6)
    write_backbone(backbone, tmp_path, name="classes")
    torch.testing.assert_close(read_backbone(tmp_path).generate(x, labels), images, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "options", "said"),
    [
        ("compact", (3, 8, 8), {"width": 3}, "no setting 'width'"),
        ("compact", (3, 8, 8), {"image_shape": (3, 4, 4)}, "image_shape of the network compact is that of the data"),
        ("ncsnpp", (3, 8, 8), {"image_size": 32}, "image_size of the network ncsnpp"),
        ("ncsnpp", (3, 8, 12), {}, "square"),
        ("compact", (3, 8, 8), {"num_classes": 10}, "num_classes of the network compact is that of the data"),
        ("imagenet64", (3, 8, 8), {"attention": [True]}, "one boolean per level"),
        ("imagenet64", (3, 8, 8), {"channels": []}, "UNet64Config.channels"),
        ("imagenet64", (3, 8, 8), {"channels": [192, 384, 576, 770]}, "groups .* must divide 770"),
        ("imagenet64", (3, 8, 8), {"head_channels": 100}, "head_channels .* must divide"),
        ("imagenet64", (3, 12, 8), {}, "multiples of 8"),
        ("imagenet64", (3, 8, 8), {"dropout": 1.0}, "dropout"),
        ("imagenet64", (3, 8, 8), {"blocks": 0}, "blocks"),
    ],
)
def test_a_network_that_cannot_be_is_refused(
    name: str, shape: tuple[int, int, int], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        Network.named(name, shape, options)


def test_an_unknown_network_has_near_matches() -> None:
    with pytest.raises(UnknownNameError, match="'ncsnpp'"):
        Network.named("ncsn++", (3, 8, 8))


def test_a_configuration_without_classes_is_that_of_an_unconditional_network() -> None:
    """With the tensors that it has always had, in their order."""
    config = CompactUNetConfig.from_dict({"image_shape": [3, 8, 8], **TINY["compact"]})
    assert config.num_classes is None
    names = list(CompactUNet(config).state_dict())
    with_classes = list(CompactUNet(config.replace(num_classes=3)).state_dict())
    assert [name for name in with_classes if name != "classes.weight"] == names


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_on_meta_costs_nothing(name: str) -> None:
    network = Network.named(name, (3, 8, 8), TINY[name])
    shapes = {key: tensor.shape for key, tensor in network.build().state_dict().items()}
    there = network.build("meta")
    assert {p.device.type for p in there.parameters()} == {"meta"}
    assert {key: tensor.shape for key, tensor in there.state_dict().items()} == shapes
