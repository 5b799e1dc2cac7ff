"""NCSN++: the official layers' results and names, derivatives, precision, its config, and a backbone's laws."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense.backbones.convert.jcm import jcm_slots
from cmap_defense.backbones.folder import read_backbone, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.ncsnpp import Attention, NCSNpp, NCSNppConfig, NoiseEmbedding
from cmap_defense.errors import SettingsError
from goldens import FOLDER, arrays, channels_first
from toys import noise

SEEDS = st.integers(0, 2**31)
SMALL = NCSNppConfig(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8)


@st.composite
def configs(draw: st.DrawFn) -> NCSNppConfig:
    levels = draw(st.integers(1, 3))
    side = 2 ** (levels - 1) * draw(st.integers(1, 3))
    sides = [side >> level for level in range(levels)]
    return NCSNppConfig(
        nf=draw(st.sampled_from([4, 8, 12, 16])),
        ch_mult=tuple(draw(st.lists(st.integers(1, 2), min_size=levels, max_size=levels))),
        num_res_blocks=draw(st.integers(1, 2)),
        attn_resolutions=tuple(draw(st.sets(st.sampled_from(sides)))),
        image_size=side,
        num_channels=draw(st.integers(1, 3)),
        skip_rescale=draw(st.booleans()),
    )


def awake(config: NCSNppConfig, seed: int = 1, dtype: torch.dtype = torch.float64) -> NCSNpp:
    """A network in eval mode whose layers are all away from zero."""
    with torch.random.fork_rng(devices=[]):
        network = NCSNpp(config).to(dtype).eval()
    with torch.no_grad():
        for index, (name, tensor) in enumerate(network.state_dict().items()):
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 10
            tensor.copy_(noise(*tensor.shape, seed=seed + index, dtype=dtype) / fan_in**0.5)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1)
            if name == "embed.frequencies":
                tensor.mul_(10**0.5 * config.fourier_scale)
    return network


def inputs(config: NCSNppConfig, batch: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and noise levels [B] of the size that ln(sigma) / 4 has."""
    return noise(batch, *config.image_shape, seed=seed, dtype=dtype), 0.7 * noise(batch, seed=seed + 1, dtype=dtype)


def backbone_of(config: NCSNppConfig, dtype: torch.dtype = torch.float64) -> ConsistencyBackbone:
    return ConsistencyBackbone(awake(config, dtype=dtype), config.image_shape).eval()


# ------------------------------------------------------------------------------------------------- official layers


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """Results of the official layers."""
    return channels_first(arrays(FOLDER / "ops" / "ops.npz"))


@pytest.fixture(scope="module")
def full() -> NCSNpp:
    """The network of the published models, without memory for its weights."""
    with torch.device("meta"):
        return NCSNpp(NCSNppConfig())


def test_fourier_features_agree(recorded: dict[str, Tensor]):
    with torch.random.fork_rng(devices=[]):
        embedding = NoiseEmbedding(24, 16.0)
    embedding.frequencies.copy_(recorded["fourier_W"])
    seen = []
    embedding.first.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    embedding(recorded["cond_t"])
    torch.testing.assert_close(seen[0], recorded["fourier"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("given", "expected", "atol"), [("gn_x", "gn", 2e-5), ("gn_small_x", "gn_small", 2e-6)])
def test_normalisation_agrees(recorded: dict[str, Tensor], given: str, expected: str, atol: float):
    """The small input tells one eps from another; on the large one flax's variance E x^2 - (E x)^2 has lost digits."""
    with torch.random.fork_rng(devices=[]):
        norm = Attention(24, rescale=True).norm
    assert norm.num_groups == recorded["gn_groups"].item()
    norm.load_state_dict({"weight": recorded["gn_scale"], "bias": recorded["gn_bias"]})
    torch.testing.assert_close(norm(recorded[given]), recorded[expected], rtol=0, atol=atol)


def attention_of(recorded: dict[str, Tensor], *, rescale: bool) -> Attention:
    """The layer with the recorded weights."""
    with torch.random.fork_rng(devices=[]):
        layer = Attention(12, rescale)
    weights = {
        "norm.weight": recorded["attn/GroupNorm_0/scale"],
        "norm.bias": recorded["attn/GroupNorm_0/bias"],
    }
    for i, name in enumerate(("query", "key", "value", "project")):
        weights[f"{name}.weight"] = recorded[f"attn/NIN_{i}/W"].T
        weights[f"{name}.bias"] = recorded[f"attn/NIN_{i}/b"]
    layer.load_state_dict(weights)
    return layer


def test_attention_agrees(recorded: dict[str, Tensor]):
    layer = attention_of(recorded, rescale=True)
    torch.testing.assert_close(layer(recorded["attn_x"]), recorded["attn"], rtol=0, atol=2e-6)


def test_attention_agrees_with_a_fused_kernel_on_unequal_axes(recorded: dict[str, Tensor]):
    layer = attention_of(recorded, rescale=False).double()
    x = noise(2, 12, 4, 2, seed=1, dtype=torch.float64)
    tokens = layer.norm(x).flatten(2).mT
    heads = [part(tokens)[:, None] for part in (layer.query, layer.key, layer.value)]
    mixed = layer.project(nn.functional.scaled_dot_product_attention(*heads)[:, 0])
    torch.testing.assert_close(layer(x), x + mixed.mT.reshape(2, 12, 4, 2), rtol=0, atol=1e-12)


def test_without_rescaling_branches_are_added_as_they_are():
    """In every layer that adds two."""
    embedding, x, image = (noise(2, *shape, seed=1, dtype=torch.float64) for shape in ((32,), (8, 8, 4), (3, 8, 4)))
    layers = {}
    for rescale in (True, False):
        down = awake(SMALL.replace(skip_rescale=rescale)).down
        layers[rescale] = down[0].stages[0].block, down[1].stages[0].attention, down[0].shrink
    for scaled, plain, width in zip(layers[True][:2], layers[False][:2], (8, 16), strict=True):
        inner = (noise(2, width, 8, 4, seed=2, dtype=torch.float64), *([embedding] if width == 8 else []))
        torch.testing.assert_close(plain(*inner), scaled(*inner) * 2**0.5, rtol=0, atol=1e-12)
    for rescale, (*_, shrink) in layers.items():
        added = shrink.pyramid(image) + shrink.block(x, embedding)
        expected = added / 2**0.5 if rescale else added
        torch.testing.assert_close(shrink(x, image, embedding), expected, rtol=0, atol=1e-12)


def test_names_and_shapes_are_those_of_the_published_checkpoint(full: NCSNpp):
    recorded = json.loads((FOLDER / "full_det" / "full_tree.json").read_text())
    found = {}
    for name, (tensor, axes) in jcm_slots(full):
        assert name not in found
        sizes = dict(zip(axes, tensor.shape, strict=True))
        found[name] = [sizes[axis] for axis in range(len(axes))]
    assert len(found) == recorded["n_tensors"] == 445
    assert found == recorded["tree"]


def test_network_has_the_published_number_of_weights(full: NCSNpp):
    """The fixed frequencies are counted among them."""
    assert sum(tensor.numel() for tensor in full.state_dict().values()) == 56_395_651


@pytest.mark.parametrize("config", [SMALL, SMALL.replace(ch_mult=(1,), attn_resolutions=(8,)), NCSNppConfig()])
def test_every_tensor_has_one_place_in_a_checkpoint(config: NCSNppConfig):
    with torch.device("meta"):
        network = NCSNpp(config)
    placed = [id(tensor) for _, (tensor, _) in jcm_slots(network)]
    own = [id(t) for t in (*network.parameters(), network.embed.frequencies)]
    assert sorted(placed) == sorted(own)


# ------------------------------------------------------------------------------------------------------ derivatives


def test_first_and_second_derivatives_are_finite_differences():
    config = NCSNppConfig(nf=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), image_size=4, fourier_scale=0.2)
    network = awake(config)
    x = noise(2, 3, 4, 2, seed=3, dtype=torch.float64).requires_grad_()
    level = noise(2, seed=4, dtype=torch.float64).requires_grad_()

    def along(x: Tensor, level: Tensor) -> Tensor:
        return network(x, level).flatten()[::5]

    assert torch.autograd.gradcheck(along, (x, level))
    assert torch.autograd.gradgradcheck(along, (x, level))


def test_second_derivatives_pass_through_the_levels():
    """Along a random direction, for the resampling and the pyramid as well."""
    network = awake(SMALL)
    x, level = inputs(SMALL, 2, 5)
    assert torch.autograd.gradgradcheck(lambda x: network(x, level), x.requires_grad_(), fast_mode=True)


def test_every_parameter_takes_part():
    """Only a bias of the keys cannot: it adds the same to everything that a softmax compares."""
    network = awake(SMALL)
    network(*inputs(SMALL, 2, 4)).square().sum().backward()
    still = {name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max().item() < 1e-12}
    assert still == {name for name, _ in network.named_parameters() if name.endswith("key.bias")}


def test_dropout_acts_in_training_alone():
    network = awake(SMALL.replace(dropout=0.5))
    x, level = inputs(SMALL, 2, 6)
    assert torch.equal(network(x, level), network(x, level))
    with torch.random.fork_rng(devices=[]):
        network.train()
        assert not torch.equal(network(x, level), network(x, level))


def test_new_network_is_close_to_zero_and_learns():
    with torch.random.fork_rng(devices=[]):
        network = NCSNpp(SMALL)
    output = network(*inputs(SMALL, 2, 1, torch.float32))
    assert output.abs().max().item() < 1e-3
    output.sum().backward()
    assert network.leave.weight.grad.abs().max().item() > 0


# -------------------------------------------------------------------------------------------------------- precision

NARROWER = {
    "half": lambda network: network.half(),
    "bfloat16": lambda network: network.bfloat16(),
    "to dtype": lambda network: network.to(torch.bfloat16),
    "to device and dtype": lambda network: network.to(device="cpu", dtype=torch.float16),
    "as another": lambda network: network.to(torch.zeros((), dtype=torch.bfloat16)),
    "over float64": lambda network: network.double().bfloat16(),
    "there and back": lambda network: network.half().float(),
}


@pytest.mark.parametrize("cast", NARROWER.values(), ids=NARROWER.keys())
def test_frequencies_stay_in_float32(cast):
    network = awake(SMALL, dtype=torch.float32)
    before = network.embed.frequencies.clone()
    cast(network)
    assert network.embed.frequencies.dtype == torch.float32
    assert torch.equal(network.embed.frequencies, before)
    assert torch.equal(network.state_dict()["embed.frequencies"], before)
    assert len({p.dtype for p in network.parameters()}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_everything_else_is_cast(dtype: torch.dtype):
    network = awake(SMALL, dtype=torch.float32).to(dtype)
    assert {p.dtype for p in network.parameters()} == {dtype}
    x, level = inputs(SMALL, 2, 1, torch.float32)
    assert network(x.to(dtype), level).dtype == dtype


def test_frequencies_become_float64_and_come_back():
    network = awake(SMALL, dtype=torch.float32)
    before = network.embed.frequencies.clone()
    network.double()
    assert network.embed.frequencies.dtype == torch.float64
    assert torch.equal(network.embed.frequencies, before.double())
    network.float()
    assert network.embed.frequencies.dtype == torch.float32
    assert torch.equal(network.embed.frequencies, before)


def test_frequencies_move_to_another_device():
    network = awake(SMALL, dtype=torch.float32).to("meta", torch.bfloat16)
    assert network.embed.frequencies.device.type == "meta"
    assert network.embed.frequencies.dtype == torch.float32


def test_bfloat16_is_near_float32_where_the_noise_is_largest():
    """Rounded frequencies would turn angles of a hundred radians by tenths, and give other images."""
    config = SMALL.replace(nf=16)
    exact = backbone_of(config, torch.float32)
    latents = noise(4, *config.image_shape, seed=7)
    expected = exact.denoise(80 * latents, 80.0)
    rounded = copy.deepcopy(exact)
    rounded.network.embed.frequencies.copy_(rounded.network.embed.frequencies.bfloat16())
    narrow = copy.deepcopy(exact).to(torch.bfloat16)
    error = (narrow.denoise(80 * latents, 80.0) - expected).abs().max().item()
    error_of_rounded = (rounded.denoise(80 * latents, 80.0) - expected).abs().max().item()
    assert error < 0.05
    assert error < error_of_rounded / 3


# ----------------------------------------------------------------------------------------------------------- config


@settings(max_examples=40)
@given(config=configs())
def test_config_json_round_trip_is_exact(config: NCSNppConfig):
    assert NCSNppConfig.from_json(config.to_json()) == config
    assert NCSNppConfig.from_dict(config.to_dict()) == config


def test_config_can_be_a_key():
    assert hash(NCSNppConfig(ch_mult=[2, 2, 2], attn_resolutions=[16])) == hash(NCSNppConfig())


@pytest.mark.parametrize(
    ("message", "values"),
    [
        (r"nf must be at least 1, but is 0", {"nf": 0}),
        (r"nf must be an integer, but is 8\.0", {"nf": 8.0}),
        (r"nf must be an integer, but is True", {"nf": True}),
        (r"nf must be a multiple of 4.*6", {"nf": 6}),
        (r"num_res_blocks must be at least 1", {"num_res_blocks": 0}),
        (r"num_channels must be at least 1", {"num_channels": -1}),
        (r"image_size must be an integer", {"image_size": (32, 32)}),
        (r"image_size \(30\) must be a multiple of 4, for 3 levels", {"image_size": 30}),
        (r"ch_mult must be a sequence, but is '22'", {"ch_mult": "22"}),
        (r"ch_mult must be at least 1", {"ch_mult": (2, 0)}),
        (r"ch_mult must be an integer", {"ch_mult": (2, 1.5)}),
        (r"ch_mult must name one level", {"ch_mult": ()}),
        (r"attn_resolutions must be a sequence, but is 16", {"attn_resolutions": 16}),
        (r"attn_resolutions must be at least 1", {"attn_resolutions": (0,)}),
        (r"fir_kernel must be 4 numbers", {"fir_kernel": (1.0, 2.0, 1.0)}),
        (r"fir_kernel\[1\] must be a number", {"fir_kernel": (1.0, "3", 3.0, 1.0)}),
        (r"fir_kernel\[0\] must be at least 0", {"fir_kernel": (-1.0, 3.0, 3.0, -1.0)}),
        (r"fir_kernel must be symmetric", {"fir_kernel": (1.0, 2.0, 3.0, 1.0)}),
        (r"fir_kernel must be symmetric and not zero", {"fir_kernel": (0.0, 0.0, 0.0, 0.0)}),
        (r"fourier_scale must be above 0", {"fourier_scale": 0.0}),
        (r"fourier_scale must be finite", {"fourier_scale": float("inf")}),
        (r"dropout must be below 1", {"dropout": 1.0}),
        (r"dropout must be at least 0", {"dropout": -0.1}),
        (r"skip_rescale must be a boolean, but is 1", {"skip_rescale": 1}),
    ],
)
def test_nonsense_config_is_refused_by_name(message: str, values: dict):
    with pytest.raises(SettingsError, match=f"^NCSNppConfig.{message}"):
        NCSNppConfig(**values)


def test_unknown_field_names_the_near_match():
    with pytest.raises(SettingsError, match="'ch_mult'"):
        NCSNppConfig.from_dict({"ch_mul": [2, 2]})


@pytest.mark.parametrize(("nf", "channels"), [(132, 132), (100, 200)])
def test_channels_that_do_not_divide_into_groups_are_refused(nf: int, channels: int):
    """There are 32 groups from 128 channels on; two hundred are those of a block with its skip."""
    with pytest.raises(SettingsError, match=f"^NCSNppConfig: {channels} channels .* 32 groups"):
        NCSNppConfig(nf=nf, ch_mult=(1,))


# ------------------------------------------------------------------------------------------------------------- laws


@settings(max_examples=10)
@given(config=configs(), batch=st.integers(2, 3), seed=SEEDS)
def test_output_is_shaped_like_the_input_and_finite(config: NCSNppConfig, batch: int, seed: int):
    x, level = inputs(config, batch, seed)
    output = awake(config)(x, level)
    assert output.shape == x.shape
    assert torch.isfinite(output).all()


@settings(max_examples=10)
@given(config=configs(), seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_f_at_sigma_min_is_the_identity_exactly(config: NCSNppConfig, seed: int, dtype: torch.dtype):
    backbone = backbone_of(config, dtype)
    x, _ = inputs(config, 2, seed, dtype)
    assert torch.equal(backbone.denoise(x, backbone.noise.sigma_min), x)
    assert not torch.equal(backbone.denoise(x, 2 * backbone.noise.sigma_min), x)


@settings(max_examples=10)
@given(config=configs(), seed=SEEDS)
def test_images_of_a_batch_do_not_see_each_other(config: NCSNppConfig, seed: int):
    backbone = backbone_of(config)
    x, level = inputs(config, 3, seed)
    sigma = (4 * level).exp()
    alone = torch.cat([backbone.denoise(x[b : b + 1], sigma[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(backbone.denoise(x, sigma), alone, rtol=1e-10, atol=1e-10)


@settings(max_examples=10)
@given(config=configs(), seed=SEEDS)
def test_output_depends_on_the_input_and_on_the_noise_level(config: NCSNppConfig, seed: int):
    network = awake(config)
    x, level = inputs(config, 2, seed)
    output = network(x, level)
    assert (network(x + 0.1, level) - output).abs().max().item() > 1e-6
    assert (network(x, level + 0.1) - output).abs().max().item() > 1e-6


@settings(max_examples=8)
@given(config=configs(), seed=SEEDS)
def test_written_backbone_is_read_to_the_bit(config: NCSNppConfig, seed: int):
    ours = backbone_of(config, torch.float32).to(memory_format=torch.channels_last)  # the layout of one that is read
    with tempfile.TemporaryDirectory() as folder:
        record = write_backbone(ours, folder, name="toy")
        theirs = read_backbone(folder)
    assert theirs.record == record
    assert theirs.network.config == config
    expected = ours.network.state_dict()
    assert theirs.network.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in theirs.network.state_dict().items())
    latents = noise(2, *config.image_shape, seed=seed)
    assert torch.equal(theirs.generate(latents), ours.generate(latents))


def test_reading_leaves_the_random_numbers_alone(tmp_path: Path):
    write_backbone(backbone_of(SMALL, torch.float32), tmp_path, name="toy")
    before = torch.random.get_rng_state()
    read_backbone(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
