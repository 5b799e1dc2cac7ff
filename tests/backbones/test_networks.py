"""What holds for every network inside a backbone: NCSN++, the compact U-Net, and the U-Net of diffusers."""

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense.backbones.diffusers import build_unet
from cmap_defense.backbones.folder import read_backbone, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.ncsnpp import NCSNpp, NCSNppConfig
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.errors import SettingsError
from tiny import randomised, unet_config
from toys import noise

SEEDS = st.integers(0, 2**31)


@st.composite
def ncsnpp_configs(draw: st.DrawFn) -> NCSNppConfig:
    levels = draw(st.integers(1, 3))
    side = 2 ** (levels - 1) * draw(st.integers(1, 3))
    return NCSNppConfig(
        nf=draw(st.sampled_from([4, 8, 12, 16])),
        ch_mult=tuple(draw(st.lists(st.integers(1, 2), min_size=levels, max_size=levels))),
        num_res_blocks=draw(st.integers(1, 2)),
        attn_resolutions=tuple(draw(st.sets(st.sampled_from([side >> level for level in range(levels)])))),
        image_size=side,
        num_channels=draw(st.integers(1, 3)),
        skip_rescale=draw(st.booleans()),
    )


@st.composite
def compact_configs(draw: st.DrawFn) -> CompactUNetConfig:
    levels, patch = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    unit = patch * 2 ** (levels - 1)
    return CompactUNetConfig(
        image_shape=(draw(st.integers(1, 3)), unit * draw(st.integers(2, 3)), unit * draw(st.integers(2, 4))),
        patch=patch,
        channels=tuple(draw(st.lists(st.sampled_from([4, 8, 12]), min_size=levels, max_size=levels))),
        blocks=draw(st.integers(1, 2)),
        attention=tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels))),
        head_channels=draw(st.sampled_from([2, 4, 32])),
        embedding=draw(st.integers(4, 17)),
        num_classes=draw(st.sampled_from([None, 3])),
    )


def diffusers_config(shape: tuple[int, int, int], attended: list[bool], widths: list[int], **more: Any) -> Any:
    channels = {"in_channels": shape[0], "out_channels": shape[0]}
    return unet_config(list(shape[1:]), attended, widths, **channels | more)


@st.composite
def diffusers_configs(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 3))
    unit = 2**levels
    return diffusers_config(
        (draw(st.integers(1, 3)), unit * draw(st.integers(1, 2)), unit * draw(st.integers(1, 3))),
        draw(st.lists(st.booleans(), min_size=levels, max_size=levels)),
        draw(st.lists(st.sampled_from([8, 16]), min_size=levels, max_size=levels)),
        layers_per_block=draw(st.integers(1, 2)),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
        attention_head_dim=draw(st.sampled_from([4, 8])),
        num_class_embeds=draw(st.sampled_from([None, 3, 7])),
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network: random configurations, a small one, the smallest, and a function that makes one of them."""

    configs: st.SearchStrategy[Any]
    small: Any
    smallest: Any
    make: Callable[[Any], nn.Module]

    def backbone(self, config: Any, dtype: torch.dtype = torch.float64) -> ConsistencyBackbone:
        """A backbone in eval mode with weights away from 0, in the layout in which folders are read."""
        with torch.random.fork_rng(devices=[]):
            network = randomised(self.make(config).to(dtype), 1)
        if isinstance(config, dict):
            shape, classes = (config["in_channels"], *config["sample_size"]), config["num_class_embeds"]
        else:
            shape, classes = config.image_shape, getattr(config, "num_classes", None)
        backbone = ConsistencyBackbone(network, shape, num_classes=classes).eval()
        return backbone.to(memory_format=torch.channels_last)


KINDS = {
    "ncsnpp": Kind(
        ncsnpp_configs(),
        NCSNppConfig(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8),
        NCSNppConfig(nf=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), image_size=4, fourier_scale=0.2),
        NCSNpp,
    ),
    "compact": Kind(
        compact_configs(),
        CompactUNetConfig(
            image_shape=(3, 8, 4), channels=(16, 16), blocks=1, attention=(False, True), head_channels=8, embedding=8
        ),
        CompactUNetConfig(
            image_shape=(1, 4, 2),
            patch=1,
            channels=(4, 4),
            blocks=1,
            attention=(True,) * 2,
            head_channels=2,
            embedding=4,
        ),
        CompactUNet,
    ),
    "diffusers": Kind(
        diffusers_configs(),
        diffusers_config((3, 8, 4), [False, True], [8, 8], num_class_embeds=5),
        diffusers_config((1, 4, 2), [True], [8]),
        build_unet,
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def inputs_of(backbone: ConsistencyBackbone, batch: int, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    """Images [B, C, H, W], noise levels [B] of the size that ln(sigma) / 4 has, and in a tuple labels [B] or none."""
    images, level = noise(batch, *backbone.image_shape, seed=seed, dtype=dtype), 0.7 * noise(batch, seed=seed + 1)
    labels = () if backbone.num_classes is None else (torch.arange(batch) % backbone.num_classes,)
    return images, level.to(dtype), labels


@each_kind
@settings(max_examples=6)
@given(data=st.data(), batch=st.integers(2, 3), seed=SEEDS)
def test_shape_precision_and_boundary(kind: Kind, data: st.DataObject, batch: int, seed: int) -> None:
    """Output like the input, and f at sigma_min the identity exactly, which it is not at twice sigma_min."""
    backbone = kind.backbone(data.draw(kind.configs), torch.float32)
    x, level, labels = inputs_of(backbone, batch, seed, torch.float32)
    output = backbone.network(x, level, *labels)
    assert output.shape == x.shape
    assert output.dtype == x.dtype
    assert torch.isfinite(output).all()
    assert torch.equal(backbone.denoise(x, backbone.noise.sigma_min, *labels), x)
    assert not torch.equal(backbone.denoise(x, 2 * backbone.noise.sigma_min, *labels), x)


@each_kind
@settings(max_examples=6)
@given(data=st.data(), seed=SEEDS)
def test_output_depends_on_input_and_level_and_on_each_image_alone(kind: Kind, data: st.DataObject, seed: int) -> None:
    backbone = kind.backbone(data.draw(kind.configs))
    x, level, labels = inputs_of(backbone, 3, seed)
    output = backbone.network(x, level, *labels)
    assert (backbone.network(x + 0.1, level, *labels) - output).abs().max().item() > 1e-9
    assert (backbone.network(x, level + 0.1, *labels) - output).abs().max().item() > 1e-9
    alone = [backbone.network(x[[b]], level[[b]], *(y[[b]] for y in labels)) for b in range(3)]
    torch.testing.assert_close(output, torch.cat(alone), rtol=1e-9, atol=1e-9)


@each_kind
@settings(max_examples=4)
@given(data=st.data(), seed=SEEDS)
def test_written_backbone_is_read_to_the_bit(kind: Kind, data: st.DataObject, seed: int) -> None:
    ours = kind.backbone(data.draw(kind.configs), torch.float32).requires_grad_(False)  # kernels depend on it
    with tempfile.TemporaryDirectory() as folder:
        record = write_backbone(ours, folder, name="toy")
        before = torch.random.get_rng_state()
        theirs = read_backbone(folder)
    assert torch.equal(torch.random.get_rng_state(), before), "reading leaves the random numbers alone"
    assert theirs.record == record
    assert (theirs.image_shape, theirs.num_classes) == (ours.image_shape, ours.num_classes)
    expected = ours.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in theirs.state_dict().items())
    latents, _, labels = inputs_of(ours, 2, seed, torch.float32)
    assert torch.equal(theirs.generate(latents, *labels), ours.generate(latents, *labels))


@each_kind
def test_first_and_second_derivatives_are_finite_differences(kind: Kind) -> None:
    """Attacks through the optimisation need both."""
    backbone = kind.backbone(kind.smallest)
    x, level, labels = inputs_of(backbone, 2, 3)

    def along(x: Tensor, level: Tensor) -> Tensor:
        return backbone.network(x, level, *labels).flatten()[::5]

    steep = kind is KINDS["diffusers"]  # its time, 1000 ln(sigma) / 4, is too steep for finite differences
    variables = (x.requires_grad_(), level.requires_grad_(not steep))
    assert torch.autograd.gradcheck(along, variables, fast_mode=True)
    assert torch.autograd.gradgradcheck(along, variables, fast_mode=True)


@each_kind
def test_every_parameter_takes_part(kind: Kind) -> None:
    """Only a bias of the keys cannot: it adds the same to everything that a softmax compares."""
    backbone = kind.backbone(kind.small)
    x, level, labels = inputs_of(backbone, 2, 4)
    backbone.network(x, level, *labels).square().sum().backward()
    parameters = dict(backbone.network.named_parameters())
    still = {name for name, p in parameters.items() if p.grad is None or p.grad.abs().max().item() < 1e-12}
    assert still == {name for name in parameters if name.endswith(("key.bias", "to_k.bias"))}


@pytest.mark.parametrize("kind", [KINDS["ncsnpp"], KINDS["compact"]])
def test_dropout_acts_in_training_alone(kind: Kind) -> None:
    backbone = kind.backbone(kind.small.replace(dropout=0.5))
    x, level, _ = inputs_of(backbone, 2, 6)
    assert torch.equal(backbone.network(x, level), backbone.network(x, level))
    with torch.random.fork_rng(devices=[]):
        backbone.train()
        assert not torch.equal(backbone.network(x, level), backbone.network(x, level))


NCSNPP_NONSENSE: list[tuple[str, dict[str, Any]]] = [
    (r"nf must be a multiple of 4.*6", {"nf": 6}),
    (r"image_size \(30\) must be a multiple of 4, for 3 levels", {"image_size": 30}),
    (r"ch_mult must be a sequence, but is '22'", {"ch_mult": "22"}),
    (r"ch_mult must name one level", {"ch_mult": ()}),
    (r"fir_kernel must be 4 numbers", {"fir_kernel": (1.0, 2.0, 1.0)}),
    (r"fir_kernel\[1\] must be a number", {"fir_kernel": (1.0, "3", 3.0, 1.0)}),
    (r"fir_kernel must be symmetric", {"fir_kernel": (1.0, 2.0, 3.0, 1.0)}),
    (r"dropout must be below 1", {"dropout": 1.0}),
]
COMPACT_NONSENSE: list[tuple[str, dict[str, Any]]] = [
    ("image_shape", {"image_shape": (0, 32, 32)}),
    ("image_shape", {"image_shape": 32}),
    (".*multiples of 4", {"image_shape": (3, 32, 34)}),
    ("channels", {"channels": (48, 0)}),
    ("channels", {"channels": (48, -96)}),
    (".*channels", {"channels": (), "attention": ()}),
    ("attention", {"attention": (0, 1)}),
    (".*head_channels", {"channels": (48, 100), "head_channels": 32}),
    ("embedding", {"embedding": 3}),
    ("dropout", {"dropout": float("nan")}),
    ("num_classes", {"num_classes": 0}),
]


@pytest.mark.parametrize(
    ("config", "message", "values"),
    [(NCSNppConfig, *row) for row in NCSNPP_NONSENSE] + [(CompactUNetConfig, *row) for row in COMPACT_NONSENSE],
)
def test_nonsense_config_is_refused_by_name(config: type[Any], message: str, values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=rf"^{config.__name__}[.: ]+{message}"):
        config(**values)


@pytest.mark.parametrize("kind", [KINDS["ncsnpp"], KINDS["compact"]])
@settings(max_examples=20)
@given(data=st.data())
def test_config_json_round_trip_is_exact(kind: Kind, data: st.DataObject) -> None:
    config = data.draw(kind.configs)
    assert type(config).from_json(config.to_json()) == config
    assert hash(type(config).from_dict(config.to_dict())) == hash(config)
