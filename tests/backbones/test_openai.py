"""OpenAI's PyTorch files as networks of the diffusers library: agreement, layouts, names, and files that differ."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense.backbones.convert import convert_openai
from cmap_defense.backbones.diffusers import DiffusersUNet, build_unet, configuration_of
from cmap_defense.backbones.folder import read_backbone, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.errors import BackboneFileError, SettingsError
from goldens import FOLDER, arrays
from tiny import randomised, unet_config
from toys import noise

OFFICIAL = FOLDER / "openai_tiny" / "tiny_cd_imagenet64_style.pt"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return arrays(FOLDER / "openai_tiny" / "io.npz")


@pytest.fixture(scope="module")
def backbone() -> ConsistencyBackbone:
    """The converted file; not to be changed."""
    meta = json.loads((FOLDER / "openai_tiny" / "meta.json").read_text())
    return convert_openai(OFFICIAL, image_size=meta["image_size"], head_channels=meta["num_head_channels"])


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_consistency_function_and_network_agree(recorded: dict[str, Tensor], backbone: ConsistencyBackbone):
    x, sigma, labels = recorded["x"], recorded["sigma"], recorded["y"]
    close(backbone.denoise(x, sigma, labels), recorded["f"], 2e-5)
    scaled = x / (sigma**2 + 0.25).sqrt()[:, None, None, None]
    close(backbone.network(scaled, sigma.log() / 4, labels), recorded["F"], 2e-5)


def test_input_gradients_agree(recorded: dict[str, Tensor], backbone: ConsistencyBackbone):
    x = recorded["x"][:2].requires_grad_()
    value = (backbone.denoise(x, recorded["sigma"][:2], recorded["y"][:2]) * recorded["w_grad"]).sum()
    (found,) = torch.autograd.grad(value, x)
    close(found, recorded["dx"], 1e-6)
    torch.testing.assert_close(value.detach(), recorded["f_grad_val"], rtol=1e-5, atol=1e-4)


def test_config_is_read_off_the_tensors(backbone: ConsistencyBackbone):
    """It is the one with which diffusers' own conversion wrote the same weights."""
    official = json.loads((FOLDER / "diffusers_tiny" / "unet" / "config.json").read_text())
    found = configuration_of(backbone.network)
    needed = {"sample_size", "in_channels", "out_channels", "layers_per_block", "block_out_channels", "norm_eps"}
    needed |= {"down_block_types", "up_block_types", "downsample_type", "upsample_type", "resnet_time_scale_shift"}
    needed |= {"attention_head_dim", "attn_norm_num_groups", "norm_num_groups", "num_class_embeds"}
    needed |= {"time_embedding_type", "flip_sin_to_cos", "freq_shift", "act_fn"}
    both = (official.keys() & found.keys()) - {"_diffusers_version"}
    assert needed <= both
    assert {name: found[name] for name in both} == {name: official[name] for name in both}


def test_published_config_has_the_published_tree():
    recorded = json.loads((FOLDER / "imagenet64_full_tree.json").read_text())
    with torch.device("meta"):  # no memory for the weights
        network = DiffusersUNet(diffusers.UNet2DModel.from_config(recorded["config"]))
    found = {name: list(tensor.shape) for name, tensor in network.unet.state_dict().items()}
    assert found == recorded["tree"]
    assert sum(tensor.numel() for tensor in network.parameters()) == recorded["n_params"] == 295_899_267


def test_written_conversion_is_read_to_the_bit(
    tmp_path: Path, recorded: dict[str, Tensor], backbone: ConsistencyBackbone
):
    write_backbone(backbone, tmp_path, name="converted")
    read = read_backbone(tmp_path)
    expected = backbone.state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in read.state_dict().items())
    close(read.denoise(recorded["x"], recorded["sigma"], recorded["y"]), recorded["f"], 2e-5)


ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def places(config: dict[str, Any]) -> dict[str, str]:
    """Where OpenAI's network has each block: it numbers the blocks of a side through, and their parts anew."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    found = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    found["mid_block.attentions.0"] = "middle_block.1"
    block = 0
    for level in range(levels):
        for layer in range(layers):
            block += 1
            found[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{block}.0"
            found[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
        block += 1
        found[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{block}.0"
    block = 0
    for level in range(levels):
        for layer in range(layers + 1):
            found[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{block}.0"
            found[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
            block += 1
        part = 2 if config["up_block_types"][level].startswith("Attn") else 1
        found[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{block - 1}.{part}"
    return found


def as_openai(network: nn.Module, config: dict[str, Any], *, convolution_axes: int) -> dict[str, Tensor]:
    """The tensors of a UNet2DModel as OpenAI's network has them.

    convolution_axes: of the 1x1 convolutions in the attentions, over positions in a row (1) or an image (2).
    """
    blocks, state = places(config), {}

    def convolution(matrix: Tensor) -> Tensor:
        return matrix.reshape(*matrix.shape, *[1] * convolution_axes) if matrix.ndim == 2 else matrix

    theirs: dict[str, Tensor] = dict(network.state_dict())
    for name, tensor in theirs.items():
        owner, leaf = name.rsplit(".", 1)
        if owner in ENDS:
            state[f"{ENDS[owner]}.{leaf}"] = tensor
            continue
        block = next(prefix for prefix in blocks if owner.startswith(f"{prefix}."))
        inner = owner.removeprefix(f"{block}.")
        if inner in RESIDUAL:
            state[f"{blocks[block]}.{RESIDUAL[inner]}.{leaf}"] = tensor
        elif inner == "group_norm":
            state[f"{blocks[block]}.norm.{leaf}"] = tensor
        elif inner == "to_out.0":
            state[f"{blocks[block]}.proj_out.{leaf}"] = convolution(tensor)
        elif inner == "to_q":
            parts = [theirs[f"{block}.{part}.{leaf}"] for part in ("to_q", "to_k", "to_v")]
            state[f"{blocks[block]}.qkv.{leaf}"] = convolution(torch.cat(parts))
    return {name: tensor.clone() for name, tensor in state.items()}


def config_of(widths: list[int], attended: list[bool], **more: Any) -> dict[str, Any]:
    plain = {"resnet_time_scale_shift": "default", "attention_head_dim": 16}
    groups = {"norm_num_groups": 32, "attn_norm_num_groups": 32}
    return unet_config(2 ** (len(widths) - 1) * 4, attended, widths, **plain | groups | more)


LSUN = config_of([32, 32, 64], [False, False, True])
"""The layout of the LSUN models: no labels, no scale with the shift, attention at the small sizes."""


def random_network(config: dict[str, Any]) -> Any:
    """A network in eval mode of these sizes, its layers away from zero."""
    with torch.random.fork_rng(devices=[]):
        return randomised(build_unet(config), 1).requires_grad_(False)


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def convert(path: Path, config: dict[str, Any] = LSUN) -> ConsistencyBackbone:
    return convert_openai(path, image_size=config["sample_size"], head_channels=16)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 3))
    return config_of(
        draw(st.lists(st.sampled_from([32, 64]), min_size=levels, max_size=levels)),
        draw(st.lists(st.booleans(), min_size=levels, max_size=levels)),
        layers_per_block=draw(st.integers(1, 3)),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        num_class_embeds=draw(st.sampled_from([None, 3])),
    )


def check_layout(folder: Path, config: dict[str, Any], convolution_axes: int) -> None:
    network = random_network(config)
    state = as_openai(network.unet, config, convolution_axes=convolution_axes)
    backbone = convert(save(state, folder / "weights.pt"), config)
    expected = network.unet.state_dict()
    assert backbone.num_classes == config["num_class_embeds"]
    assert configuration_of(backbone.network) == configuration_of(network)
    assert backbone.network.unet.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in backbone.network.unet.state_dict().items())
    x, level = noise(2, *backbone.image_shape, seed=1), torch.tensor([1.1, -0.4])
    labels = () if backbone.num_classes is None else (torch.tensor([2, 0]),)
    assert torch.equal(backbone.network(x, level, *labels), network(x, level, *labels))


@settings(max_examples=5)
@given(config=layouts(), convolution_axes=st.integers(1, 2))
def test_any_layout_is_converted(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], convolution_axes: int
):
    check_layout(tmp_path_factory.mktemp("layout"), config, convolution_axes)


@pytest.fixture(scope="module")
def lsun() -> dict[str, Tensor]:
    """A whole file's tensors; not to be changed."""
    return as_openai(random_network(LSUN).unet, LSUN, convolution_axes=1)


def test_head_channels_change_the_images(tmp_path: Path, lsun: dict[str, Tensor]):
    """They are not in the tensors, so that a wrong number is not noticed."""
    path = save(lsun, tmp_path / "weights.pt")
    made = [convert_openai(path, image_size=16, head_channels=heads) for heads in (16, 32)]
    latents = noise(2, 3, 16, 16, seed=1)
    assert (made[0].generate(latents) - made[1].generate(latents)).abs().max().item() > 1e-4


@pytest.mark.parametrize("name", ["weights.pt", "step1256.pt", "v3.pt", "model_640.pt"])
def test_unknown_image_size_is_an_error_that_names_the_option(tmp_path: Path, name: str):
    """Before the file is opened."""
    with pytest.raises(SettingsError, match=f"{name}.*image_size"):
        convert_openai(tmp_path / name)


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(names)}


DAMAGE = {
    "nothing": ("", lambda state: {}),
    "a width of other groups": (
        "48",
        lambda state: state | {"input_blocks.1.0.in_layers.2.weight": torch.zeros(48, 32, 3, 3)},
    ),
    "blocks without numbers": ("ValueError", lambda state: state | {"input_blocks.a.0.weight": torch.zeros(2)}),
    "a block missing": ("KeyError", without("input_blocks.2.")),
    "the last block missing": ("ValueError", without("output_blocks.5.")),
    "half an embedding": ("time_embedding.linear_1.bias", without("time_embed.0.bias")),
    "one too many": ("ema.weight", lambda state: state | {"ema.weight": torch.zeros(2)}),
    "another shape": ("conv_out.bias", lambda state: state | {"out.2.bias": torch.zeros(5)}),
}


@pytest.mark.parametrize(("words", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_other_networks_are_refused(
    tmp_path: Path, lsun: dict[str, Tensor], words: str, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]]
):
    path = save(damage(lsun), tmp_path / "weights.pt")
    with pytest.raises(BackboneFileError, match="is not a U-Net of OpenAI's consistency models") as caught:
        convert(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (torch.tensor([0.0, float("nan"), 0.0]), r"'conv_out\.bias' holds NaN or infinite"),
        (torch.tensor([0.0, float("inf"), 0.0]), r"'conv_out\.bias' holds NaN or infinite"),
        (torch.zeros(3, dtype=torch.complex64), r"'out\.2\.bias' is no dense floating-point tensor"),
        (torch.zeros(3, dtype=torch.int64), r"'out\.2\.bias' is no dense floating-point tensor"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_by_name(
    tmp_path: Path, lsun: dict[str, Tensor], bias: Tensor, words: str
):
    path = save(lsun | {"out.2.bias": bias}, tmp_path / "weights.pt")
    with pytest.raises(BackboneFileError, match=words):
        convert(path)
